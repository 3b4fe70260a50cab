"""The arguments of a stage as its recipe would have them on a GPU, on whatever machine this is."""

from collections.abc import Mapping
from typing import Any

from rlhf_recipes.memory.stages import Arguments
from rlhf_recipes.stages import parse_values

_MIXED = ("bf16", "fp16", "tf32")


def resolve(
    stage: str, recipe: str, values: Mapping[str, Any], earlier: Mapping[str, Arguments], triton: bool = True
) -> Arguments:
    """The arguments of a stage, parsed by its recipe, and resolved as on a GPU.

    Args:
        stage: its name.
        recipe: the recipe's.
        values: of its YAML file.
        earlier: folder -> the arguments of the stage that writes it.
        triton: whether for a GPU; a CPU is for comparison.

    Raises:
        RecipeError: what the recipe would say.
    """
    # Asking for them is refused where there is no GPU; what they are by default depends on the machine too
    mixed = {key: values[key] for key in _MIXED if key in values and not values.get("use_cpu")}
    others = {key: value for key, value in values.items() if key not in mixed}
    groups = parse_values(recipe, others, here=False)
    parsed = {key: value for group in groups for key, value in vars(group).items()}
    if not values.get("use_cpu") and triton:
        parsed |= {"bf16": not mixed.get("fp16"), **mixed}
    return Arguments(stage, recipe, parsed, earlier, triton)
