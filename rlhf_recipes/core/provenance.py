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
    """The most memory that was in use: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "bytes": torch.cuda.max_memory_allocated()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"device": "process on CPU", "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def versions() -> dict[str, str]:
    """Those of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def files_in(values: Any, leave_out: Iterable[Path | None] = ()) -> list[tuple[str, int, int]]:
    """Path, size and time (ns) of every file that is named, or lies in a folder that is.

    Args:
        values: texts, in lists and mappings; those that are no paths are passed over.
        leave_out: folders and files that are not looked at.
    """
    if isinstance(values, dict | list):
        items = values.values() if isinstance(values, dict) else values
        return [found for item in items for found in files_in(item, leave_out)]
    if not isinstance(values, str) or len(values) > 1000:
        return []
    try:
        named = Path(resolve_path(values)).expanduser()
        files = [named] if named.is_file() else sorted(named.rglob("*")) if named.is_dir() else []
        files = [path for path in files if path.is_file() and not {path, *path.parents} & set(leave_out)]
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except (OSError, RuntimeError, ValueError):  # a text that is no path
        return []
