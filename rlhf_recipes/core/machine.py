"""Whether bitsandbytes works on this machine."""

import importlib.metadata
import logging
import warnings
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line

import torch

logger = logging.getLogger(__name__)


def check_bitsandbytes(quantized: bool, training: Any) -> None:
    """Reject bitsandbytes' weights and optimizers on a GPU that it does not support.

    By itself it fails at its first kernel, after the weights are loaded. On a CPU it can do all but paging.

    Args:
        quantized: whether weights are in 4 or 8 bits.
        training: arguments, with `optim` and `use_cpu` if the recipe trains.

    Raises:
        RecipeError: with its version and what is missing.
    """
    optim = str(getattr(getattr(training, "optim", ""), "value", getattr(training, "optim", "")))
    if not quantized and not any(word in optim for word in ("8bit", "paged")):
        return
    if getattr(training, "use_cpu", False) or not torch.cuda.is_available():
        if "paged" in optim:
            logger.warning("optim: %s: on a CPU nothing is paged; the optimizer is otherwise the same", optim)
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU", category=UserWarning)
        return
    from bitsandbytes.cextension import lib

    if not lib.compiled_with_cuda:
        key = "load_in_4bit, load_in_8bit" if quantized else f"optim: {optim}"
        reason = f": {first_line(RuntimeError(lib.error_msg))}" if hasattr(type(lib), "_format_dependency_error") else ""
        version = importlib.metadata.version("bitsandbytes")
        without = "load_in_4bit: false" if quantized else "optim: adamw_torch"
        raise RecipeError(
            f"{key}: bitsandbytes {version} has no library for this GPU (PyTorch has CUDA {torch.version.cuda}){reason}. Fix: "
            f"`pip install --upgrade bitsandbytes`, and see what `python -m bitsandbytes` reports; or set `{without}`"
        )
