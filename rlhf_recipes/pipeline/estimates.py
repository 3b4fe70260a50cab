"""The arguments of all stages in a pipeline's or recipe's file that have a plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_recipes.config.launcher import check_single_gpu_plan
from rlhf_recipes.config.origins import origin_of
from rlhf_recipes.config.overrides import merge_overrides
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.paths import resolve_config_path
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.memory import StageArguments
from rlhf_recipes.memory.gpu_arguments import resolve_for_gpu
from rlhf_recipes.memory.planners import has_planner
from rlhf_recipes.pipeline.fitting import fit_stages
from rlhf_recipes.pipeline.reading import read_stages
from rlhf_recipes.pipeline.settings import SET, Settings
from rlhf_recipes.stages import STAGES


def plannable_stages(
    config: Path,
    recipes: Path,
    recipe: str | None = None,
    on_gpu: bool = True,
    gpu_memory: float | None = None,
    settings: Settings = (),
) -> list[StageArguments]:
    """Return the arguments of a file's plannable stages, with `gpu_memory` applied.

    `config` is the file of a pipeline, or of one recipe, whose `needs` are read too; that recipe is `recipe`, by default the
    name of the file. `gpu_memory` (GB) replaces that of a pipeline; `settings` are those of `--set`. A stage that does not
    fit gets the arguments that take least memory.
    """
    values = read_yaml(config)
    if "stages" in values:
        file = read_stages(config, recipes, settings)
        file = fit_stages(replace(file, gpu_memory=file.gpu_memory and (gpu_memory or file.gpu_memory)), must_fit=False)
        if gpu_memory is not None:
            check_single_gpu_plan(file.launcher)
        stages = [(stage.name, stage.recipe, stage.values, stage.origin) for stage in file.stages]
    else:
        recipe = recipe or config.stem
        if not has_planner(recipe):
            known = ", ".join(filter(has_planner, STAGES))
            raise RecipeError(f"{config}: its name is no recipe that can be planned. Fix: add --recipe, one of {known}")
        needs = (resolve_config_path(path, recipes) for path in values.get("needs") or ())
        files = {path: read_yaml(path) for path in needs if path.is_file() and path.stem in STAGES}
        stages = [(path.stem, path.stem, content, origin_of(path, content)) for path, content in files.items()]
        overrides = _settings_of_recipe(settings)
        stages.append((recipe, recipe, merge_overrides(values, overrides), origin_of(config, values, overrides)))
    producers: dict[str, StageArguments] = {}
    planned = []
    for name, kind, arguments, origin in stages:
        if has_planner(kind):
            with origin.context():
                planned.append(resolve_for_gpu(name, kind, arguments, dict(producers), on_gpu))
            producers[str(planned[-1].output_dir)] = planned[-1]
    return planned if "stages" in values else planned[-1:]


def _settings_of_recipe(settings: Settings) -> dict[str, Any]:
    for scope, key, _ in settings:
        if scope:
            raise RecipeError(f"{SET}: {scope}.{key}: the file is of one recipe. Fix: write {key}=VALUE")
    return {key: value for _, key, value in settings}
