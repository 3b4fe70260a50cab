"""What a YAML file asks for to be faster: refused before a model is loaded where it cannot be had, else set right."""

import importlib.util
import os
from typing import Any

from rlhf_recipes.errors import RecipeError

import torch
from transformers.utils import is_liger_kernel_available
from trl import ModelConfig
from trl.import_utils import is_vllm_available

REGIONAL = "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"
"""Accelerate's, by which it compiles each layer of a decoder by itself; Transformers' arguments have no such key."""


def prepare(arguments: ModelConfig, training: Any) -> None:
    """Looks, before a model is loaded, at the keys that are there for speed.

    Args:
        arguments: TRL's model arguments.
        training: those of the trainer.

    Raises:
        RecipeError: if the package that a key needs is not there, or vLLM could not take the policy's weights.
    """
    of_the_hub = {f"attn_implementation: {arguments.attn_implementation}": "/" in (arguments.attn_implementation or "")}
    of_the_hub["model_init_kwargs: use_kernels"] = (getattr(training, "model_init_kwargs", None) or {}).get("use_kernels")
    for key, asked in of_the_hub.items():
        if asked and importlib.util.find_spec("kernels") is None:
            raise RecipeError(
                f"{key}: asks for kernels of the Hub, and `kernels` is not installed: `pip install 'rlhf-recipes[kernels]'`, "
                "or leave the key out"
            )
    on_cpu = getattr(training, "use_cpu", False) or not torch.accelerator.is_available()
    if arguments.attn_implementation == "flex_attention" and hasattr(training, "learning_rate") and on_cpu:
        raise RecipeError(
            "attn_implementation: flex_attention has no backward pass on a CPU: leave the key out for PyTorch's own attention"
        )
    if getattr(training, "use_liger_kernel", False) and not is_liger_kernel_available():
        raise RecipeError(
            "use_liger_kernel: Liger is not installed: `pip install 'rlhf-recipes[liger]'`, or set `use_liger_kernel: false`"
        )
    check_vllm(training, bool(arguments.load_in_4bit or arguments.load_in_8bit))
    compile_by_layers(training)


def check_vllm(training: Any, quantised: bool) -> None:
    """Refuses rollouts by vLLM where they cannot be had.

    Args:
        training: the arguments of the trainer; of those that do not sample too.
        quantised: whether the base is in 4 or 8 bits.

    Raises:
        RecipeError: if vLLM is not there, or would hold the base in bits that weights cannot be sent to.
    """
    if not getattr(training, "use_vllm", False):
        return
    if not is_vllm_available():
        raise RecipeError(
            "use_vllm: vLLM is not installed: `pip install 'rlhf-recipes[vllm]'` on a machine with a GPU, or set "
            "`use_vllm: false`"
        )
    if quantised and training.vllm_mode == "colocate":
        raise RecipeError(
            "vllm_mode: colocate: over a quantised base TRL has vLLM quantise its own copy, to which no new weights can be "
            "sent: set `vllm_mode: server` (vLLM then holds the model in 16 bits, elsewhere), `load_in_4bit: false`, or "
            "`use_vllm: false`"
        )


def compile_by_layers(training: Any) -> None:
    """Has `torch_compile` compile each layer by itself, and leave alone what is around them.

    The whole at once is what Transformers' Trainer compiles. TRL's LM head in tiles cannot be traced without Triton, and hooks
    on the trunk, by which PPO reads its states, would have it compiled again at every step.
    """
    if getattr(training, "torch_compile", False):
        os.environ.setdefault(REGIONAL, "true")


def keep_forward(training: Any) -> None:
    """Has Liger replace layers alone, and not the model's forward pass, which ours and TRL's losses call in their own way."""
    if training.use_liger_kernel:
        training.liger_kernel_config = {**(training.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
