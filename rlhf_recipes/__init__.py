"""RLHF on one consumer GPU: the library from which `recipes/` are composed."""

import logging
import warnings
from typing import Any

# On a CPU it warns at import that a kernel of the Hub is missing, 4-bit weights or not; it has one of its own.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# PEFT 0.21 reads it by its old name; nobody who reads the warning can do anything about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

__all__ = ["PPOConfig", "PPOTrainer"]


def __getattr__(name: str) -> Any:
    """`PPOConfig` and `PPOTrainer`, imported when they are asked for: they bring all of TRL with them."""
    if name in __all__:
        import rlhf_recipes.ppo

        return getattr(rlhf_recipes.ppo, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
