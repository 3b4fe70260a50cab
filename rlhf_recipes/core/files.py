"""What stages leave beside weights and read of one another: the names of the files, and JSON in and out."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError

RECIPE = "recipe.json"
"""Of every stage: what was run, on which base, and what it cost."""
PENDING = "recipe.unfinished.json"
"""The same, of a stage that has trained and not measured yet: by `recipe.json` others take a stage for done."""
SAMPLED, RANKED, METRICS = "sample.json", "rank.json", "metrics.json"
"""What `sample`, `rank` and `evaluate` write last."""
LOG = "log.jsonl"
"""Of a training: a line of JSON for everything that was logged."""
REWARD_EVALUATION = ("evaluation.json", "reliability-*.svg", "scores-*.svg")
"""What held-out comparisons say of a reward model, as patterns of file names."""

REWARD = "reward.json"
"""Of a reward model: its base and the scale of its scores; of an ensemble: its members and how they are combined."""
# What the others rely on, by the way to it; of lists the type of their entries. A file that somebody edited may hold anything
_OF_RECORDS = {
    "base_model": dict,
    "base_model.name": str,
    "base_model.fingerprint": dict,
    "base_model.fingerprint.dimensions": dict,
    "data": dict,
    "data.train": dict,
    "run": dict,
    "ensemble": dict,
    "parents": (list, str),
    "stages": (list, dict),
    "log": (list, dict),
}
_WORDS = {dict: "mapping", list: "list", str: "text"}


def write_text(path: Path, text: str) -> None:
    """Writes a file so that `path` holds either all of it or what it held before."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or the new name might reach the disk before what it names
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # which the system does not say where a disk is full
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # on a full disk it is in the way of others
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, as `write_text` does."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def holds_result(folder: str | Path) -> bool:
    """Whether a stage has finished there, ours or another's; one that was broken off has left checkpoints alone."""
    names = (RECIPE, REWARD, "adapter_config.json", "config.json")
    return any((Path(folder) / name).is_file() for name in names)


def trained_on_conversations(folder: str | Path) -> bool | None:
    """Whether what the stage in a folder was trained on were conversations; None where no record says so.

    Raises:
        RecipeError: as `read_json`.
    """
    train = (read_json(Path(folder) / RECIPE).get("data") or {}).get("train") or {}
    return train.get("conversational")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, or nothing where there is no such file, as beside adapters that TRL alone trained.

    Raises:
        RecipeError: if it is malformed.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: must hold a mapping, and holds a {type(content).__name__}")
    if path.name in (RECIPE, PENDING, REWARD):
        for keys, kind in _OF_RECORDS.items():
            _check_type(content, keys, kind, path)
    return content


def _check_type(content: dict[str, Any], keys: str, kind: Any, path: Path) -> None:
    value: Any = content
    for key in keys.split("."):
        value = (value or {}).get(key)
    outer, inner = kind if isinstance(kind, tuple) else (kind, object)
    if value is not None and not (isinstance(value, outer) and all(isinstance(item, inner) for item in value)):
        place, found = keys.replace(".", ": "), json.dumps(value)[:100]
        of = f" of {_WORDS[inner]}s" if inner is not object else ""
        raise RecipeError(f"{path}: {place}: must be a {_WORDS[outer]}{of}, and is {found}: run that stage again")


def check_writable(output: Path) -> None:
    """Says at the start what would otherwise be found out when the first checkpoint, or a report, is written.

    Raises:
        RecipeError: if the folder cannot be made, or nothing can be written into it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RecipeError(f"output_dir: {output}: cannot be written to ({error.strerror}): name another folder") from error
