"""Where results come from: versions and peak memory."""

import importlib.metadata
import platform
import resource
import sys
from typing import Any

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
