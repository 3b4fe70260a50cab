"""All stages in order, from one YAML file; a restart resumes where it stopped.

    python recipes/pipeline.py                                # configs/tiny/pipeline.yaml: the tiny world, on a CPU
    python recipes/pipeline.py --config my.yaml --dry-run     # what would be done
    python recipes/pipeline.py --config my.yaml --stages sft,reward

Each stage is one `accelerate launch` of its recipe, with the setup of `accelerate config`. With `seeds` in the YAML file, all
stages run with each seed, and a table sums up the evaluations.
"""

import argparse
from pathlib import Path

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.core.paths import user_path
from rlhf_recipes.pipeline import check_arguments, read_pipeline

RECIPES = Path(__file__).resolve().parent


def main() -> None:
    """Print the plan, then run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=user_path, default=RECIPES.parent / "configs" / "tiny" / "pipeline.yaml")
    parser.add_argument("--stages", type=lambda text: text.split(","), help="names of stages, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    options = parser.parse_args()

    pipeline = read_pipeline(options.config, RECIPES, options.stages)
    check_arguments(pipeline, options.config)
    print(*pipeline.describe(), sep="\n", flush=True)
    for stage in pipeline.stages:
        for note in stage.plan.notes if stage.plan else ():
            print(f"{stage.name}: {note}", flush=True)
    if not options.dry_run:
        pipeline.run()
        print(*pipeline.write_summaries(), sep="\n")


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
