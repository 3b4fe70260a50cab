"""The plans of all stages of a YAML file, of a pipeline or of one recipe."""

from pathlib import Path

from rlhf_recipes.config.launcher import refuse_one_gpus_arithmetic
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.memory.gpu_arguments import StageArguments, resolve_for_gpu
from rlhf_recipes.memory.planners import has_planner
from rlhf_recipes.pipeline.reading import checked_card, found, read_stages
from rlhf_recipes.stages import pipeline_stages


def card_in(config: Path) -> float | None:
    """GB of the card that a pipeline's file names, or None.

    Raises:
        RecipeError: for what is no size of a card.
    """
    values = read_yaml(config)
    return checked_card(values.get("gpu_memory"), str(config)) if "stages" in values else None


def arguments_in(
    config: Path, recipes: Path, recipe: str | None = None, triton: bool = True, card: float | None = None
) -> list[StageArguments]:
    """The arguments of those stages in a YAML file that can be planned, with what `gpu_memory` chooses where a pipeline has it.

    Args:
        config: of a pipeline, or of one recipe, with those that it `needs`.
        recipes: the folder of the recipes.
        recipe: of which the file is; None: that of its name.
        triton: whether for a GPU; a CPU is for comparison.
        card: GB, in place of a pipeline's `gpu_memory`.

    Raises:
        RecipeError: as the recipes would; not for stages that do not fit, which have then what takes least.
    """
    values = read_yaml(config)
    if "stages" in values:
        read = read_stages(config, recipes, card if "gpu_memory" in values else None, must_fit=False)
        if card is not None:
            refuse_one_gpus_arithmetic(read.engine)
        stages = [(stage.name, stage.recipe, stage.values) for stage in read.stages]
    else:
        recipe = recipe or config.stem
        if recipe not in pipeline_stages():
            raise RecipeError(f"{config}: of which recipe is it? say so with --recipe: one of {', '.join(pipeline_stages())}")
        stages = [(path.stem, path.stem, read_yaml(path)) for path in _needed(values, recipes)]
        stages.append((recipe, recipe, values))
    earlier: dict[str, StageArguments] = {}
    planned = []
    for name, kind, given in stages:
        if has_planner(kind):
            planned.append(resolve_for_gpu(name, kind, given, dict(earlier), triton))
            earlier[str(planned[-1].output_dir)] = planned[-1]
    return planned if "stages" in values else planned[-1:]


def _needed(values: dict, recipes: Path) -> list[Path]:
    """The YAML files of the stages that a single one names in `needs`, so far as they are there."""
    paths = [found(path, recipes) for path in values.get("needs") or []]
    return [path for path in paths if path.is_file() and path.stem in pipeline_stages()]
