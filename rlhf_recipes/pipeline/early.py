"""Keys and paths of a pipeline's stages, checked before PyTorch is imported."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rlhf_recipes.config.keys import check_all_keys
from rlhf_recipes.config.origins import origin_of
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.paths import add_current_folder
from rlhf_recipes.inputs import check_inputs, is_within
from rlhf_recipes.pipeline.reading import PipelineFile, PipelineStage
from rlhf_recipes.stages import STAGES


def check_recipe_keys(config: Path, values: Mapping[str, Any], recipe: str) -> None:
    """Reject keys in the file of one recipe that it does not have.

    Raises:
        RecipeError: with the place of the key.
    """
    if recipe in STAGES:
        with origin_of(config, values).context():
            check_all_keys(values, STAGES[recipe].argument_types())


def check_stage_keys(file: PipelineFile) -> None:
    """Reject keys that a stage's recipe does not have.

    Raises:
        RecipeError: with the place of the key.
    """
    for stage in file.stages:
        with stage.origin.context():
            check_all_keys(stage.values, STAGES[stage.recipe].argument_types())


def check_stage_inputs(file: PipelineFile, stages: Collection[PipelineStage]) -> None:
    """Check that what some stages name is there, or will be written by a stage before.

    Raises:
        RecipeError: with the place of the argument.
    """
    add_current_folder()
    written: list[Path] = []
    names = {stage.entry for stage in file.stages}

    def is_written(path: str) -> bool:
        if path in names and not Path(path).exists():
            raise RecipeError(f'{path}: is a stage, not a folder. Fix: write "{{{path}}}"')
        return is_within(path, written)

    for stage in file.stages:
        if stage in stages:
            with stage.origin.context():
                check_inputs(stage.values, STAGES[stage.recipe].argument_types(), is_written)
        written.append(stage.folder.absolute())
