"""All stages in order, from one YAML file; a restart resumes where it stopped.

    python recipes/pipeline.py                                # configs/tiny/pipeline.yaml: the tiny world, on a CPU
    python recipes/pipeline.py --config my.yaml --dry-run     # what would be done
    python recipes/pipeline.py --config my.yaml --stages sft,reward --set sft.learning_rate=1e-4

Each stage is one `accelerate launch` of its recipe, with the setup of `accelerate config`. With `seeds` in the YAML file, all
stages run with each seed, and a table sums up the evaluations.
"""

import argparse
from pathlib import Path

try:
    from rlhf_recipes.cli import exit_on_recipe_error
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}. Fix: run `source .venv/bin/activate` first") from None
from rlhf_recipes.core.paths import user_path
from rlhf_recipes.pipeline.early import check_stage_inputs, check_stage_keys
from rlhf_recipes.pipeline.reading import read_stages
from rlhf_recipes.pipeline.settings import read_settings

RECIPES = Path(__file__).resolve().parent


def main() -> None:
    """Print the plan, then run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=user_path, default=RECIPES.parent / "configs" / "tiny" / "pipeline.yaml")
    parser.add_argument("--stages", type=lambda text: text.split(","), help="names of stages, separated by commas")
    parser.add_argument(
        "--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="an argument of a stage; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    options = parser.parse_args()

    # Keys and paths; the other checks import PyTorch, which takes seconds
    settings = read_settings(options.set)
    file = read_stages(options.config, RECIPES, settings)
    check_stage_keys(file)
    check_stage_inputs(file, file.select(options.stages))
    from rlhf_recipes.pipeline.checks import check_arguments
    from rlhf_recipes.pipeline.running import read_pipeline

    pipeline = read_pipeline(options.config, RECIPES, options.stages, settings)
    check_arguments(pipeline)
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
