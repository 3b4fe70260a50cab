"""The memory that a YAML file will need, stage by stage, before any weights are downloaded.

    python recipes/plan.py                                    # configs/tiny/pipeline.yaml: the tiny world
    python recipes/plan.py --config my.yaml --gpu_memory 12   # of a pipeline or of a recipe; what to change for 12 GB
    python recipes/plan.py --config my.yaml --recipe ppo      # where the file's name does not say which recipe it is of

Reads the model's config.json and nothing else. It says what is in memory at the peak of every stage, and which cards that
fits. `docs/memory.md` has the arithmetic, and how far it was from what was measured.
"""

import argparse
from pathlib import Path

from rlhf_recipes.arguments import user_errors
from rlhf_recipes.pipeline.planning import arguments_in
from rlhf_recipes.plan import advice, plan_stage, report

RECIPES = Path(__file__).resolve().parent


def main() -> None:
    """Plans and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=RECIPES.parent / "configs" / "tiny" / "pipeline.yaml")
    parser.add_argument("--recipe", help="of which the file is, by default that of its name")
    parser.add_argument("--gpu_memory", type=float, metavar="GB", help="a card that it should fit")
    options = parser.parse_args()

    stages = arguments_in(options.config, RECIPES, options.recipe)
    plans = [plan_stage(stage) for stage in stages]
    print(*report(plans), sep="\n")

    if options.gpu_memory is not None:
        for stage, plan in zip(stages, plans, strict=True):
            fits = plan.fits(options.gpu_memory)
            remedy = "it fits" if fits else f"it does not fit: {'; '.join(advice(stage, options.gpu_memory))}"
            print(f"{plan.stage} on {options.gpu_memory:g} GB: {remedy}")


if __name__ == "__main__":
    with user_errors():
        main()
