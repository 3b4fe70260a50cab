"""What bitsandbytes can do on this machine."""

import importlib.metadata
import logging
import warnings
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line

import torch

logger = logging.getLogger(__name__)

_OPTIMIZERS = ("8bit", "paged")  # in the names of those that are of bitsandbytes alone


def check_bitsandbytes(quantised: bool, training: Any) -> None:
    """Refuses weights and optimizers of bitsandbytes on a GPU for which it has no library; on a CPU it has all but paging.

    It says nothing itself until its first kernel is called, which is after the weights are read.

    Args:
        quantised: whether weights are in 4 or 8 bits.
        training: for `optim`, and `use_cpu`; recipes that do not train have neither.

    Raises:
        RecipeError: with what it lacks.
    """
    optim = str(getattr(getattr(training, "optim", ""), "value", getattr(training, "optim", "")))
    own = any(word in optim for word in _OPTIMIZERS)
    if not quantised and not own:
        return
    if getattr(training, "use_cpu", False) or not torch.cuda.is_available():
        if "paged" in optim:
            logger.warning("optim: %s: on a CPU nothing is paged, and it does the same without", optim)
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU", category=UserWarning)
        return
    from bitsandbytes.cextension import lib

    if not lib.compiled_with_cuda:
        key = "load_in_4bit, load_in_8bit" if quantised else f"optim: {optim}"
        reason = f": {first_line(RuntimeError(lib.error_msg))}" if hasattr(type(lib), "_format_dependency_error") else ""
        version, without = (
            importlib.metadata.version("bitsandbytes"),
            "load_in_4bit: false" if quantised else "optim: adamw_torch",
        )
        raise RecipeError(
            f"{key}: bitsandbytes {version} has no library for this GPU (PyTorch has CUDA {torch.version.cuda}){reason}: `pip "
            f"install --upgrade bitsandbytes`, and see what `python -m bitsandbytes` says; or do without (`{without}`)"
        )
