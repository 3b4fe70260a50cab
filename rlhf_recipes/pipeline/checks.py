"""Checks of the arguments and local data of all stages, before the first one runs."""

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.data import Kind, check_source
from rlhf_recipes.evaluation.measurement import check_judge
from rlhf_recipes.feedback.ranking import read_labeler
from rlhf_recipes.generation.judges import read_chat_judge
from rlhf_recipes.generation.policies import read_policies
from rlhf_recipes.inputs import is_reward_folder, is_within
from rlhf_recipes.pipeline.running import Pipeline
from rlhf_recipes.rewards.reward_funcs import check_reward_funcs, reward_paths
from rlhf_recipes.stages import STAGES, parse_values

_DATA = ("dataset_name", "datasets", "eval_datasets")


def check_arguments(pipeline: Pipeline) -> None:
    """Parse every stage's arguments, and read the local data of unfinished stages.

    A wrong value or an empty file of the last stage is found before hours of the others.

    Raises:
        RecipeError: with the place of the argument, or the stage.
    """
    written = [stage.folder.absolute() for stage in (*pipeline.stages, *pipeline.unselected)]
    checked: set[str] = set()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:  # begins when it is used
        for stage in pipeline.stages:
            with stage.origin.context():
                groups = parse_values(stage.recipe, stage.values)
                if pipeline.status(stage) == "done":
                    continue
                for place, source, kind in _sources(groups, STAGES[stage.recipe].data):
                    if not is_within(source.path, written) and f"{source} {kind}" not in checked:
                        with error_context(place):
                            check_source(source, kind)
                        checked.add(f"{source} {kind}")
                _check_names(stage.values, written, apart)
                kind = STAGES[stage.recipe]
                if kind.data == "prompt" and not kind.trains and not any(stage.values.get(key) for key in _DATA):
                    raise RecipeError("eval_datasets: missing, and there is no `dataset_name`. Fix: name prompts")


def _check_names(values: Mapping[str, Any], written: Sequence[Path], apart: Executor) -> None:
    """Check the rewards, policies and judges that arguments name, without loading any."""
    _check_rewards("reward_funcs", values.get("reward_funcs") or (), written, apart)
    names = _check_rewards("rewards", values.get("rewards") or (), written, apart)
    judge, labeller = values.get("judge"), values.get("labeller") or {}
    if isinstance(judge, dict):
        read_chat_judge(judge)
    else:
        check_judge(judge, names)
    if "path" in labeller:
        entry = {key: value for key, value in labeller.items() if key in ("path", "arguments")}
        _check_rewards("labeller", [entry], written, apart)
    elif labeller:
        read_labeler(labeller, seed=0)
    if policies := values.get("policies"):
        read_policies({name: None if is_within(_path_of(entry), written) else entry for name, entry in policies.items()})


def _check_rewards(key: str, entries: Sequence[Any], written: Sequence[Path], apart: Executor) -> list[str | None]:
    """Return the names of rewards, checked; modules of the user are imported apart.

    They may load a model, even onto the card, which the end of that process releases.
    """
    paths = [path for path in reward_paths(entries) if path and not is_reward_folder(path)]
    if any(not path.startswith("rlhf_recipes.") for path in paths):
        try:
            return apart.submit(check_reward_funcs, key, entries, written).result()
        except (BrokenProcessPool, SystemExit) as error:
            named = ", ".join(path for path in paths if not path.startswith("rlhf_recipes."))
            raise RecipeError(
                f"{key}: {named}: importing it ended Python ({type(error).__name__}). Fix: mend its module"
            ) from error
    return check_reward_funcs(key, entries, written)


def _path_of(entry: Any) -> str:
    path = entry.get("path") if isinstance(entry, dict) else entry
    return path if isinstance(path, str) else ""


def _sources(groups: tuple[Any, ...], kind: Kind | None) -> Iterator[tuple[str, DatasetSource, Kind | None]]:
    """Yield key, dataset and the kind that is read, of all that arguments name."""
    for group in groups:
        for name, value in vars(group).items():
            if name == "dataset_name" and value:
                yield name, DatasetSource(path=value, column_mapping=group.column_mapping), kind
            for number, entry in enumerate(value if isinstance(value, list) else (), start=1):
                if isinstance(entry, DatasetSource):
                    yield f"{name}, entry {number}", entry, kind if name in ("datasets", "eval_datasets") else None
