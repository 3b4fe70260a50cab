"""Earlier stages, which a recipe's YAML file names in `needs`."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.config.parser import values_of
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.warning_log import relay_warnings
from rlhf_recipes.inputs import needed_stages
from rlhf_recipes.stages import STAGES

from accelerate import PartialState


def run_dependencies(recipe: str | Path, arguments: Sequence[Any]) -> None:
    """Run the stages in `needs` that are read and have no result yet.

    A stage is read if its `output_dir`, or a file in it, is named by the arguments or by a later stage that will run. So
    `--start_from` of your own runs no SFT. The YAML files are named like their recipes: `sft.yaml` for `sft.py`.

    Args:
        recipe: the recipe's `__file__`.
        arguments: its dataclasses.

    Raises:
        RecipeError: if a file is missing or a stage fails; or if a stage would have to be run by one of several processes,
            since the others would wait for half an hour at most.
    """
    recipes = Path(recipe).parent
    needs = next((group.needs for group in arguments if hasattr(group, "needs")), ())
    needed = list(needed_stages(needs, values_of(arguments), recipes))
    for number, (config, output) in enumerate(needed, start=1):
        stage = recipes / f"{config.stem}.py"
        if PartialState().num_processes > 1:
            raise RecipeError(
                f"needs: {output} has no result yet, and several processes cannot wait for it. "
                f"Fix: first run `accelerate launch {stage} --config {config}`"
            )
        print(f"[{number}/{len(needed)}] {output} has no result yet: running {config} first", flush=True)
        resume = ["--resume_from_checkpoint", "true"] if STAGES[config.stem].trains else []
        with relay_warnings(config.stem, on_terminal=True) as environment:
            code = subprocess.run([sys.executable, str(stage), "--config", str(config), *resume], env=environment).returncode
        if code:
            raise RecipeError(f"needs: {config}: this stage failed; its own message is above")
