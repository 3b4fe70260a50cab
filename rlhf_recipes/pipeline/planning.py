"""The plans of all stages of a YAML file, of a pipeline or of one recipe."""

from pathlib import Path

from rlhf_recipes.arguments import nearest, read_yaml
from rlhf_recipes.errors import RecipeError
from rlhf_recipes.pipeline.reading import RECIPES, found, read_stages
from rlhf_recipes.plan.arguments import resolve
from rlhf_recipes.plan.stages import Arguments, Plan, can_be_planned, plan_stage


def plan_file(config: Path, recipes: Path, recipe: str | None = None, triton: bool = True) -> list[Plan]:
    """The plans of the stages in a YAML file.

    Args:
        config: of a pipeline, or of one recipe.
        recipes: the folder of the recipes.
        recipe: of which it is; None: that of the file's name.
        triton: whether for a GPU; a CPU is for comparison.

    Raises:
        RecipeError: as the recipes would, and for what cannot be planned.
    """
    return [plan_stage(stage) for stage in arguments_in(config, recipes, recipe, triton)]


def arguments_in(config: Path, recipes: Path, recipe: str | None = None, triton: bool = True) -> list[Arguments]:
    """The arguments of those stages in a YAML file that can be planned."""
    values = read_yaml(config)
    if "stages" in values:
        stages = [(stage.name, stage.recipe, stage.values) for stage in read_stages(config, recipes).stages]
    else:
        recipe = recipe or config.stem
        if recipe not in RECIPES:
            raise RecipeError(f"{config}: of which recipe is it? say so with --recipe{nearest(recipe, RECIPES)}")
        stages = [(path.stem, path.stem, read_yaml(path)) for path in _needed(values, recipes)]
        stages.append((recipe, recipe, values))
    earlier: dict[str, Arguments] = {}
    for name, kind, given in stages:
        if can_be_planned(kind):
            earlier[str(given["output_dir"])] = resolve(name, kind, given, recipes, dict(earlier), triton)
    planned = list(earlier.values())
    return planned if "stages" in values else planned[-1:]


def _needed(values: dict, recipes: Path) -> list[Path]:
    """The YAML files of the stages that a single one names in `needs`, so far as they are there."""
    paths = [found(path, recipes) for path in values.get("needs") or []]
    return [path for path in paths if path.is_file() and path.stem in RECIPES]
