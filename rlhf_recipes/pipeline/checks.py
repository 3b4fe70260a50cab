"""Checks of the arguments and local data of all stages, before the first one runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.core.errors import error_context
from rlhf_recipes.data import Kind, check_source
from rlhf_recipes.pipeline.running import Pipeline
from rlhf_recipes.stages import STAGES, parse_values


def check_arguments(pipeline: Pipeline, config: Path) -> None:
    """Parse every stage's arguments, and read the local data of unfinished stages.

    A misspelt key or an empty file of the last stage is found before hours of the others.

    Raises:
        RecipeError: with the file and the stage.
    """
    folders = [stage.folder.absolute() for stage in (*pipeline.stages, *pipeline.unselected)]
    checked: set[str] = set()
    for stage in pipeline.stages:
        with error_context(f"{config}: stages: {stage.name} (its YAML file with its `arguments`)"):
            groups = parse_values(stage.recipe, stage.values)
            sources = _sources(groups, STAGES[stage.recipe].data) if pipeline.status(stage) != "done" else ()
            for source, kind in sources:
                from_a_stage = any(Path(source.path).absolute().is_relative_to(folder) for folder in folders)
                if not from_a_stage and f"{source} {kind}" not in checked:
                    check_source(source, kind)
                    checked.add(f"{source} {kind}")


def _sources(groups: tuple[Any, ...], kind: Kind | None) -> Iterator[tuple[DatasetSource, Kind | None]]:
    """Yield the datasets that arguments name, with the kind that the stage reads."""
    for group in groups:
        for name, value in vars(group).items():
            if name == "dataset_name" and value:
                yield DatasetSource(path=value, column_mapping=group.column_mapping), kind
            for entry in value if isinstance(value, list) else ():
                if isinstance(entry, DatasetSource):
                    yield entry, kind if name in ("datasets", "eval_datasets") else None
