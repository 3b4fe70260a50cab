"""Files that stages leave for each other: their names, atomic writes, and JSON."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, error_context, failed_write

RECIPE = "recipe.json"
"""Record of a stage: what was run, on which base, and at what cost. It is written last: with it the stage is done."""
PENDING = "recipe.unfinished.json"
"""The same, of a stage that has trained and is not finished."""
SAMPLED, RANKED, METRICS = "sample.json", "rank.json", "metrics.json"
"""Records of the recipes `sample`, `rank` and `evaluate`, which they write last."""
ANSWERS = "answers.jsonl"
"""All answers of an evaluation: a line of JSON for each policy and prompt."""
ADAPTER = "adapter_model.safetensors"
"""Weights of an adapter, beside `adapter_config.json`."""
LOG = "log.jsonl"
"""Log of a training: a line of JSON for everything that was logged."""
REWARD = "reward.json"
"""Of a reward model, its base and the scale of its scores; of an ensemble, its members and how they are combined."""
REWARD_EVALUATION = ("evaluation.json", "reliability-*.svg", "scores-*.svg")
"""Results of a reward model on held-out comparisons, as patterns of file names."""


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: `path` holds all of it, or what it held before."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or the new name might reach the disk before the content
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, empty if there is no such file.

    Raises:
        RecipeError: if the file is damaged.
    """
    if not path.exists():
        return {}
    with error_context(f"{path}: not valid JSON", OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a mapping, found {type(content).__name__}")
    return content


def holds_result(folder: str | Path) -> bool:
    """Return whether a folder holds a finished stage, not only checkpoints."""
    names = (RECIPE, REWARD, "adapter_config.json", "config.json")
    return any((Path(folder) / name).is_file() for name in names)


def trained_on_conversations(folder: str | Path) -> bool | None:
    """Return whether a stage was trained on conversations; None if not recorded."""
    train = (read_json(Path(folder) / RECIPE).get("data") or {}).get("train") or {}
    return train.get("conversational")


@contextlib.contextmanager
def atomic_directory(output_dir: str | Path) -> Iterator[Path]:
    """Yield a folder that becomes `output_dir` at the end, or is deleted on error.

    Raises:
        RecipeError: if `output_dir` is not empty, or cannot be written to.
    """
    output = Path(output_dir).resolve()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise RecipeError(f"output_dir: {output_dir} is not empty. Fix: name another folder, or delete it")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run
    check_writable(partial)
    try:
        yield partial
        if output.is_dir():
            output.rmdir()
        os.replace(partial, output)
    except Exception as error:
        reason, file = failed_write(error) or ("", "")
        if not reason or (file and partial not in (Path(file), *Path(file).parents)):  # not of this folder
            raise
        message = f"output_dir: {output_dir}: cannot be written to ({reason}); nothing is left of it"
        raise RecipeError(f"{message}. Fix: make room, or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(output: Path) -> None:
    """Reject, before the work, an output folder that cannot be written to.

    Raises:
        RecipeError: with the reason.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RecipeError(f"output_dir: {output}: cannot be written to ({error.strerror}). Fix: name another folder") from error
