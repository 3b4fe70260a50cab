"""Keys of YAML files and of command lines, checked without PyTorch."""

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rlhf_recipes.config.origins import COMMAND_LINE
from rlhf_recipes.core.errors import RecipeError, did_you_mean, error_context
from rlhf_recipes.core.inspection import dataclass_fields

_SOURCE = "rlhf_recipes.config.data.DatasetSource"


def check_keys(values: Mapping[str, Any], known: Collection[str]) -> None:
    """Reject a key that no argument of a recipe has.

    Raises:
        RecipeError: with the key, and a similar one.
    """
    if "stages" in values and "stages" not in known:
        raise RecipeError("stages: this is the file of a pipeline. Fix: launch it with recipes/pipeline.py")
    for key in values:
        if key not in known:
            raise RecipeError(f"unknown key '{key}'{did_you_mean(str(key), known)}")


def check_all_keys(values: Mapping[str, Any], types: Mapping[str, str]) -> None:
    """Reject unknown keys, also in the entries of mixtures of data.

    Args:
        values: keys and values.
        types: the known keys, with their types as text.

    Raises:
        RecipeError: with the key, and a similar one.
    """
    check_keys(values, types)
    for key, value in values.items():
        for number, entry in enumerate(value if "DatasetSource" in types[key] and isinstance(value, list) else (), start=1):
            if isinstance(entry, dict):
                with error_context(f"{key}, entry {number}"):
                    check_keys(entry, dataclass_fields(_SOURCE))


def unknown_option(word: str, known: Collection[str]) -> RecipeError:
    """Return the error about a word of the command line that is no option."""
    key = word.removeprefix("--").split("=")[0].replace("-", "_")
    return RecipeError(f"{COMMAND_LINE}: unknown option '{word}'{did_you_mean(key, known)}")


def read_options(argv: Sequence[str], types: Mapping[str, str]) -> dict[str, Any]:
    """Return a command line's options, as far as their text tells.

    Args:
        argv: the command line without the program's name.
        types: the known keys, with their types as text.

    Returns:
        Key -> text, list or mapping; numbers are text too.

    Raises:
        RecipeError: for an unknown option.
    """
    options: dict[str, list[str]] = {}
    words: list[str] = []
    for word in argv:
        if not word.startswith("--") or " " in word.partition("=")[0]:
            words.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if key not in types and key.removeprefix("no_") not in types and key not in ("config", "help"):
            raise unknown_option(word, [*types, "config"])
        words = options[key] = [value] if equals else []
    return {key: _value(words, types.get(key, "str")) for key, words in options.items() if words}


def _value(words: Sequence[str], annotation: str) -> Any:
    if words[0].lower() in ("none", "null"):
        return None
    values = [_parse_json(word) for word in words]
    if annotation.startswith("list"):
        entries = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
        return [{"path": entry} if "DatasetSource" in annotation and isinstance(entry, str) else entry for entry in entries]
    return values[0]


def _parse_json(word: str) -> Any:
    with contextlib.suppress(ValueError):  # the parser reports it
        return json.loads(word) if word.startswith(("{", "[")) else word
    return None
