"""`~` and `$NAME` in the paths of YAML files and command lines, and what is there."""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.core.hub import resolve_path

PATH_KEYS = {"output_dir", "model_name_or_path", "start_from", "chat_template_path", "resume_from_checkpoint", "needs", "path"}
PATH_KEYS |= {"dataset_name", "data_dir", "data_files", "policies", "rewards", "reward_funcs", "adapter", "groups", "reward"}
PATH_KEYS |= {"store", "frontier", "config", "accelerate_config", "deepspeed", "fsdp_config", "cache_dir", "logging_dir"}
"""Keys whose text is a path, at the top of a YAML file or in a list or mapping there."""
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expand_path(text: str) -> str:
    """Return a path with its `$NAME`, `${NAME}` and `~` replaced, as a shell would.

    Raises:
        RecipeError: for a variable that is not set, an unknown user, or a `~` that is not at the start.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise RecipeError(f"{text}: ${name} is not set. Fix: run `export {name}=...` first, or write the path out")
        return os.environ[name]

    path = os.path.expanduser(_VARIABLE.sub(value_of, text))
    if path.startswith("~") or "~" in path.split("/"):
        raise RecipeError(f"{text}: `~` is a home folder at the start of a path only. Fix: write the path out")
    return path


def add_current_folder() -> None:
    """Let Python find functions in the current folder, which dotted paths name."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def resolve_config_path(path: str, recipes: Path) -> Path:
    """Return a path in the current folder, else in the checkout of `recipes`."""
    in_checkout = recipes.parent / path
    return in_checkout if in_checkout.exists() and not Path(path).exists() else Path(path)


def user_path(text: str) -> Path:
    """Return an option of a command line that is a path, expanded."""
    return Path(expand_path(text))


def expand_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a YAML file with their paths expanded.

    Text under a key of `PATH_KEYS` is a path. So is any other that begins with `~/`, such as an argument of a function.

    Raises:
        RecipeError: as `expand_path`, with the key.
    """
    return {key: _expand(str(key), key, value, key in PATH_KEYS) for key, value in values.items()}


def _expand(place: str, key: Any, value: Any, is_path: bool) -> Any:
    if isinstance(value, dict):
        names_paths = key in ("policies", "data_files")  # name -> path, split -> files; others: key -> value
        return {name: _expand(f"{place}: {name}", name, item, names_paths or name in PATH_KEYS) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(f"{place}, entry {number}", key, item, is_path) for number, item in enumerate(value, start=1)]
    if isinstance(value, str) and (is_path or value.startswith("~/")):
        with error_context(place):
            return expand_path(value)
    return value


def files_in(values: Any, exclude: Iterable[Path | None] = ()) -> list[tuple[str, int, int]]:
    """Return path, size and mtime (ns) of files that are named or in a named folder.

    Args:
        values: texts, in lists and mappings; those that are no paths are skipped.
        exclude: folders and files to leave out.
    """
    if isinstance(values, dict | list):
        items = values.values() if isinstance(values, dict) else values
        return [file for item in items for file in files_in(item, exclude)]
    if not isinstance(values, str) or len(values) > 1000:
        return []
    try:
        path = Path(resolve_path(values))
        files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
        files = [file for file in files if file.is_file() and not {file, *file.parents} & set(exclude)]
        return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except (OSError, RuntimeError, ValueError):  # a text that is no path
        return []
