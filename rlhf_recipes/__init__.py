"""RLHF on one consumer GPU: the library from which `recipes/` are composed."""

import logging
import warnings

# On a CPU it warns at import that a kernel of the Hub is missing, 4-bit weights or not; it has one of its own.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# PEFT 0.21 reads it by its old name; nobody who reads the warning can do anything about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
