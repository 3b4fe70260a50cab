"""The arguments of a stage as its recipe would have them on a GPU, on whatever machine this is."""

import contextvars
import runpy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_recipes.arguments import parse_arguments
from rlhf_recipes.errors import RecipeError
from rlhf_recipes.plan.stages import Arguments

import yaml

_MIXED = ("bf16", "fp16", "tf32")


def resolve(
    stage: str, recipe: str, values: Mapping[str, Any], recipes: Path, earlier: Mapping[str, Arguments], triton: bool = True
) -> Arguments:
    """The arguments of a stage, parsed by its recipe, and resolved as on a GPU.

    Args:
        stage: its name.
        recipe: the recipe's.
        values: of its YAML file.
        recipes: the folder of the recipes.
        earlier: folder -> the arguments of the stage that writes it.
        triton: whether for a GPU; a CPU is for comparison.

    Raises:
        RecipeError: what the recipe would say.
    """
    types = runpy.run_path(str(recipes / f"{recipe}.py"), run_name="stage")["ARGUMENTS"]
    # Asking for them is refused where there is no GPU; what they are by default depends on the machine too
    mixed = {key: values[key] for key in _MIXED if key in values and not values.get("use_cpu")}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / f"{recipe}.yaml"
        written.write_text(yaml.safe_dump({key: value for key, value in values.items() if key not in mixed}), encoding="utf-8")
        try:
            # In a context of its own: what goes wrong later does not come from this file
            groups = contextvars.copy_context().run(parse_arguments, recipes / recipe, *types, argv=["--config", str(written)])
        except RecipeError as error:
            raise RecipeError(str(error).removeprefix(f"{written}: ")) from error
    parsed = {key: value for group in groups for key, value in vars(group).items()}
    if not values.get("use_cpu") and triton:
        parsed |= {"bf16": not mixed.get("fp16"), **mixed}
    return Arguments(stage, recipe, parsed, earlier, triton)
