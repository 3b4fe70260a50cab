"""The memory that a pipeline or a recipe will need, before any download.

    python recipes/plan.py                                    # configs/tiny/pipeline.yaml: the tiny world
    python recipes/plan.py --config my.yaml --gpu_memory 12   # and what to change to fit 12 GB
    python recipes/plan.py --config my.yaml --recipe ppo      # for a file that is not named after its recipe

Reads only the model's config.json. Prints what is in memory at the peak of every stage, and which cards that fits.
`docs/memory.md` has the arithmetic, and its errors against measurements.
"""

import argparse
from pathlib import Path

try:
    from rlhf_recipes.cli import exit_on_recipe_error
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}. Fix: run `source .venv/bin/activate` first") from None
from rlhf_recipes.config.origins import COMMAND_LINE
from rlhf_recipes.core.errors import error_context
from rlhf_recipes.core.paths import user_path
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.pipeline.early import check_recipe_keys, check_stage_keys
from rlhf_recipes.pipeline.reading import read_stages
from rlhf_recipes.pipeline.schema import check_gpu_memory
from rlhf_recipes.pipeline.settings import read_settings

RECIPES = Path(__file__).resolve().parent


def main() -> None:
    """Print the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=user_path, default=RECIPES.parent / "configs" / "tiny" / "pipeline.yaml")
    parser.add_argument("--recipe", help="recipe that the file is for (default: that of its name)")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="as of recipes/pipeline.py")
    parser.add_argument(
        "--gpu_memory",
        type=float,
        metavar="GB",
        help="memory of the card, in place of the file's `gpu_memory`: MiB of nvidia-smi / 1024, such as 22.5 for an L4",
    )
    options = parser.parse_args()

    # Keys; the plan imports PyTorch, which takes seconds
    with error_context(COMMAND_LINE):
        card = None if options.gpu_memory is None else check_gpu_memory(options.gpu_memory)
    settings, values = read_settings(options.set), read_yaml(options.config)
    if "stages" in values:
        file = read_stages(options.config, RECIPES, settings)
        check_stage_keys(file)
        card = file.gpu_memory if card is None else card
    else:
        check_recipe_keys(options.config, values, options.recipe or options.config.stem)
    from rlhf_recipes.memory import advice, format_plans, plan_stage
    from rlhf_recipes.pipeline.estimates import plannable_stages

    stages = plannable_stages(options.config, RECIPES, options.recipe, gpu_memory=options.gpu_memory, settings=settings)
    plans = [plan_stage(stage) for stage in stages]
    print(*format_plans(plans), sep="\n")

    if card is not None:
        for stage, plan in zip(stages, plans, strict=True):
            remedy = "it fits" if plan.fits(card) else f"it does not fit: {advice(stage, card)}"
            print(f"{plan.stage} on {card:g} GB: {remedy}")


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
