"""Where results come from: versions, peak memory, and the files that were read."""

import importlib.metadata
import platform
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_recipes.core.hub import resolve_path

import torch

PACKAGES = ("rlhf-recipes", "torch", "trl", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "evaluate")


def peak_memory() -> dict[str, Any]:
    """Return the peak memory, bytes: of the GPU, or of this process on a CPU."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "bytes": torch.cuda.max_memory_allocated()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"device": "process on CPU", "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


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
