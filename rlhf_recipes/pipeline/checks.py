"""Checks of the arguments and local data of all stages, before the first one runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.core.errors import error_context
from rlhf_recipes.data import Kind, check_source
from rlhf_recipes.evaluation.measurement import check_judge
from rlhf_recipes.pipeline.running import Pipeline
from rlhf_recipes.rewards.reward_funcs import check_reward_funcs
from rlhf_recipes.stages import STAGES, parse_values


def check_arguments(pipeline: Pipeline) -> None:
    """Parse every stage's arguments, and read the local data of unfinished stages.

    A wrong value or an empty file of the last stage is found before hours of the others.

    Raises:
        RecipeError: with the place of the argument, or the stage.
    """
    folders = [stage.folder.absolute() for stage in (*pipeline.stages, *pipeline.unselected)]

    def from_a_stage(path: str) -> bool:
        return any(Path(path).absolute().is_relative_to(folder) for folder in folders)

    checked: set[str] = set()
    for stage in pipeline.stages:
        with stage.origin.context():
            groups = parse_values(stage.recipe, stage.values)
            if pipeline.status(stage) == "done":
                continue
            for place, source, kind in _sources(groups, STAGES[stage.recipe].data):
                if not from_a_stage(source.path) and f"{source} {kind}" not in checked:
                    with error_context(place):
                        check_source(source, kind)
                    checked.add(f"{source} {kind}")
            check_reward_funcs("reward_funcs", stage.values.get("reward_funcs") or (), from_a_stage)
            names = check_reward_funcs("rewards", stage.values.get("rewards") or (), from_a_stage)
            judge = stage.values.get("judge")
            check_judge(judge if isinstance(judge, str) else None, names)


def _sources(groups: tuple[Any, ...], kind: Kind | None) -> Iterator[tuple[str, DatasetSource, Kind | None]]:
    """Yield key, dataset and the kind that is read, of all that arguments name."""
    for group in groups:
        for name, value in vars(group).items():
            if name == "dataset_name" and value:
                yield name, DatasetSource(path=value, column_mapping=group.column_mapping), kind
            for number, entry in enumerate(value if isinstance(value, list) else (), start=1):
                if isinstance(entry, DatasetSource):
                    yield f"{name}, entry {number}", entry, kind if name in ("datasets", "eval_datasets") else None
