"""RLHF on one consumer GPU: the library from which `recipes/` are composed."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

# Python puts the folder of a script first on its path, where recipes/evaluate.py would pass for the library of that name.
if sys.path and Path(sys.path[0], "evaluate.py").is_file():
    sys.path.append(sys.path.pop(0))

# On a CPU it warns at import that a kernel of the Hub is missing, 4-bit weights or not; it has one of its own.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# PEFT 0.21 and TRL 1.16 use their old names; nobody who reads the warnings can do anything about it.
warnings.filterwarnings("ignore", message=r"`\w*gradient_checkpointing\w*` is deprecated", category=FutureWarning)

__all__ = ["PPOConfig", "PPOTrainer"]


def __getattr__(name: str) -> Any:
    """Import `PPOConfig` and `PPOTrainer` on first use: they import all of TRL."""
    if name in __all__:
        import rlhf_recipes.training.ppo

        return getattr(rlhf_recipes.training.ppo, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
