"""The files, folders and functions that arguments name, checked without PyTorch.

The recipes check them again where they read them, by the functions below.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.core.files import ADAPTER, REWARD, holds_result
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.core.inspection import check_dotted_path
from rlhf_recipes.core.paths import resolve_config_path
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.stages import find_stage, training_stages

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""Ending of a data file -> the builder of `datasets` that reads it."""
DATA_ENDINGS = f"{', '.join(BUILDERS)} (text files also with .gz)"


def check_inputs(
    values: Mapping[str, Any], types: Mapping[str, str], is_written: Callable[[str], bool] = lambda path: False
) -> None:
    """Check that what arguments name is there; names on the Hub are left alone.

    Args:
        values: keys and values of its YAML file.
        types: key -> its type, as text.
        is_written: whether an earlier stage writes a path.

    Raises:
        RecipeError: with the key.
    """
    for key, value in values.items():
        for place, path, check in _inputs(key, value, types.get(key, "")):
            named = f": {path}" if check in (require_reward, require_reward_folder) else ""
            with error_context(f"{place}{named}"):
                if path and not is_written(path):
                    check(path)


def _inputs(key: str, value: Any, annotation: str) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Yield key, path, and the check of all that one argument names."""
    if key in _SINGLE and isinstance(value, str):
        yield key, value, _SINGLE[key]
    elif key == "policies" and isinstance(value, dict):
        for name, entry in value.items():
            yield f"{key}: {name}", _path_of(entry), functools.partial(require_adapter, name=name)
    elif key == "labeller":
        yield key, _path_of(value), require_reward
    elif isinstance(value, list):
        check = require_data if "DatasetSource" in annotation else _LISTS.get(key)
        for number, entry in enumerate(value if check else (), start=1):
            yield f"{key}, entry {number}", _path_of(entry), check


def is_within(path: str, folders: Iterable[Path]) -> bool:
    """Return whether a path is one of some absolute folders, or in one."""
    return any(Path(path).absolute().is_relative_to(folder) for folder in folders)


def _path_of(entry: Any) -> str | None:
    """Return the path of an entry that must be there."""
    if isinstance(entry, dict):
        entry = None if entry.get("optional") else entry.get("path")
    return entry if isinstance(entry, str) else None


# --- Stages that are needed --------------------------------------------------------------------------------


def needed_stages(needs: Sequence[str], values: Mapping[str, Any], recipes: Path) -> Iterator[tuple[Path, Path]]:
    """Yield YAML file and folder of each stage in `needs` to run, in order.

    These are read, by `values` or by a later one of them, and have no result yet.
    """
    named, found = set(_paths_in(values)), []
    for name in reversed(needs):
        config = resolve_config_path(name, recipes)
        settings = read_yaml(config)
        output = Path(settings.get("output_dir") or ".")
        if (
            any(output in (path, *path.parents[:-1]) for path in named)
            and not (output / find_stage(config.stem).result).exists()
        ):
            found.append((config, output))
            named.update(_paths_in(settings))
    yield from reversed(found)


def _paths_in(values: Any) -> Iterator[Path]:
    """Yield all texts in arguments as paths, but for the stage's own folder."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _paths_in(value) if key not in ("output_dir", "needs") else ()
    elif isinstance(values, list):
        for value in values:
            yield from _paths_in(value)
    elif hasattr(values, "path"):  # an entry of `datasets`
        yield from _paths_in(values.path)
    elif isinstance(values, str):
        yield Path(values)


# --- Data --------------------------------------------------------------------------------------------------


def builder_of(path: str) -> str | None:
    """Return the builder of `datasets` that reads a file of this ending, or None."""
    return BUILDERS.get(Path(path.lower().removesuffix(".gz")).suffix)


def is_data_file(path: str) -> bool:
    """Return whether a source is a single file, by its name."""
    return builder_of(path) is not None


def is_function(path: str) -> bool:
    """Return whether a source of data is the dotted path of a function."""
    return not Path(path).exists() and "." in path and all(name.isidentifier() for name in path.split("."))


def require_data(path: str) -> None:
    """Raise a RecipeError if a source names a file or function that is not there."""
    if is_data_file(path):
        if not Path(path).is_file():
            raise RecipeError(f"{path}: there is no such file in {Path(path).absolute().parent}. Fix: correct the path.")
    elif (path.count("/") > 1 or path.startswith((".", "/", "~"))) and not Path(path).exists():  # Hub names are OWNER/NAME
        raise RecipeError(f"{path}: there is no such file or folder (looked in {Path.cwd()}). Fix: correct the path.")
    elif is_function(path):
        try:
            check_dotted_path(path)
        except RecipeError as error:
            raise no_data_function(path, error) from error


def no_data_function(path: str, error: Exception) -> RecipeError:
    """Return the error about a dotted path that names no function."""
    return RecipeError(
        f"{path}: neither a file that ends in {DATA_ENDINGS}, nor a folder, nor a Python function ({error}). "
        "Fix: correct it, or put the folder of the function on PYTHONPATH."
    )


def require_groups(path: str) -> None:
    """Raise a RecipeError if there is no file or folder of sampled groups."""
    if not Path(path).exists():
        raise RecipeError(f"{path}: cannot be read (No such file or directory). Fix: name a JSONL file of groups")


# --- Models ------------------------------------------------------------------------------------------------


def check_model(name: str) -> str:
    """Return the local folder of a model, or its name on the Hub.

    Raises:
        RecipeError: if the folder is missing, or holds an adapter.
    """
    path = resolve_path(name)
    folder = Path(path)
    if (folder / "adapter_config.json").exists():
        raise RecipeError(
            f"{path} holds an adapter, not a model. Fix: name its base here (to resume a run, set "
            "`resume_from_checkpoint: true`)"
        )
    if (path.startswith((".", "/")) or path.count("/") > 1) and not folder.is_dir():
        raise RecipeError(f"{path}: no such folder")
    return path


def require_base(name: str) -> None:
    """Raise a RecipeError if a local folder holds no base model."""
    folder = Path(check_model(name))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise RecipeError(f"{folder}: holds no model (no config.json). Fix: name the folder of a model, or one on the Hub")


def require_start(folder: str) -> None:
    """Raise a RecipeError if a folder holds no adapter to start from."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise RecipeError(f"{folder}: no adapter there (no adapter_config.json). Fix: train it first, or name another folder")
    require_weights(Path(folder) / ADAPTER)


def require_adapter(folder: str, name: str = "") -> None:
    """Raise a RecipeError if a folder holds no adapter; name the recipe that makes it.

    `name` is that of the policy, which may be the recipe's.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        require_weights(Path(folder) / ADAPTER)
        return
    if (Path(folder) / "config.json").is_file():
        raise RecipeError(f"{folder} holds a complete model. Fix: evaluate it alone, as `model_name_or_path`.")
    stage = next((stage for stage in training_stages() if stage in Path(folder).name or stage in name), None)
    recipe = f"recipes/{stage}.py" if stage else "recipes/sft.py, dpo.py or ppo.py"
    raise RecipeError(f"{folder} holds no adapter (adapter_config.json). Fix: train it with {recipe}, or name another folder.")


def require_weights(path: Path) -> None:
    """Raise a RecipeError if there is no safetensors file of an adapter or a model."""
    if not path.is_file():
        pickles = [name for name in ("adapter_model.bin", "pytorch_model.bin") if (path.parent / name).exists()]
        fix = f". Fix: save {pickles[0]} as safetensors; pickles are not read" if pickles else ""
        raise RecipeError(f"{path.parent}: no {path.name} there{fix}")


def require_merge_source(folder: str) -> None:
    """Raise a RecipeError if a folder holds nothing that recipes/merge.py could read."""
    if not holds_result(folder):
        require_adapter(folder)


# --- Rewards -----------------------------------------------------------------------------------------------


def is_reward_folder(path: str) -> bool:
    """Return whether an entry of `reward_funcs` is a saved reward model, no function."""
    return "/" in path or Path(path).is_dir()


def require_reward(path: str) -> None:
    """Raise a RecipeError if there is no such reward model or function."""
    if is_reward_folder(path):
        require_reward_folder(path)
    elif "." not in path or not all(part.isidentifier() for part in path.split(".")):
        raise RecipeError("expected a folder, or a dotted path such as rlhf_recipes.rewards.exact_match")
    else:
        check_dotted_path(path)


def require_reward_folder(folder: str) -> None:
    """Raise a RecipeError if a folder holds no reward model."""
    if not Path(folder).is_dir():
        raise RecipeError("no such folder. Fix: train it first (recipes/reward.py), or name another")
    reject_unfinished_ensemble(Path(folder))
    if not holds_result(folder):
        raise RecipeError("holds no reward model. Fix: train it first (recipes/reward.py), or name another folder")
    if (Path(folder) / "adapter_config.json").is_file():
        require_weights(Path(folder) / ADAPTER)


def reject_unfinished_ensemble(folder: Path) -> None:
    """Raise a RecipeError if a folder holds members of an ensemble that are unlisted."""
    if not any((folder / name).exists() for name in (REWARD, "adapter_config.json", "config.json")) and any(
        folder.glob("member-*/*config.json")
    ):
        raise RecipeError(
            f"{folder}: is an unfinished ensemble: no {REWARD} lists its members. Fix: resume it with "
            "`resume_from_checkpoint: true`, or name one member"
        )


_SINGLE: dict[str, Callable[[str], Any]] = {
    "model_name_or_path": require_base,
    "start_from": require_start,
    "adapter": require_merge_source,
    "dataset_name": require_data,
    "groups": require_groups,
    "reward": require_reward_folder,
}
"""Key -> the check of the path that it names."""
_LISTS = {"reward_funcs": require_reward, "rewards": require_reward, "frontier": require_adapter}
"""Key -> the check of the paths in its list."""
