"""What a YAML file asks for to be faster: refused before a model is loaded where it cannot be had, else set right."""

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

from rlhf_recipes.core.errors import RecipeError

import torch
from accelerate.utils.other import is_repeated_blocks
from peft import PeftModel
from torch import nn
from transformers.utils import is_liger_kernel_available
from trl import ModelConfig
from trl.import_utils import is_vllm_available


def check_kernel_options(arguments: ModelConfig, training: Any) -> None:
    """Looks, before a model is loaded, at the keys that are there for speed.

    Args:
        arguments: TRL's model arguments.
        training: those of the trainer.

    Raises:
        RecipeError: if the package that a key needs is not there, or it could do nothing.
    """
    of_the_hub = {f"attn_implementation: {arguments.attn_implementation}": "/" in (arguments.attn_implementation or "")}
    of_the_hub["model_init_kwargs: use_kernels"] = (getattr(training, "model_init_kwargs", None) or {}).get("use_kernels")
    for key, asked in of_the_hub.items():
        if asked and importlib.util.find_spec("kernels") is None:
            raise RecipeError(
                f"{key}: asks for kernels of the Hub, and `kernels` is not installed: `pip install --editable '.[kernels]'`, "
                "or leave the key out"
            )
    on_cpu = getattr(training, "use_cpu", False) or not torch.accelerator.is_available()
    if arguments.attn_implementation == "flex_attention" and hasattr(training, "learning_rate") and on_cpu:
        raise RecipeError(
            "attn_implementation: flex_attention has no backward pass on a CPU: leave the key out for PyTorch's own attention"
        )
    if getattr(training, "use_liger_kernel", False) and not is_liger_kernel_available():
        raise RecipeError(
            "use_liger_kernel: Liger is not installed: `pip install --editable '.[liger]'`, or set `use_liger_kernel: false`"
        )
    check_vllm(training, bool(arguments.load_in_4bit or arguments.load_in_8bit))
    _is_compiled(training)


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
            "use_vllm: vLLM is not installed: `pip install --editable '.[vllm]'` on a machine with a GPU, or set "
            "`use_vllm: false`"
        )
    if quantised and training.vllm_mode == "colocate":
        raise RecipeError(
            "vllm_mode: colocate: over a quantised base TRL has vLLM quantise its own copy, to which no new weights can be "
            "sent: set `vllm_mode: server` (vLLM then holds the model in 16 bits, elsewhere), `load_in_4bit: false`, or "
            "`use_vllm: false`"
        )


def _is_compiled(training: Any) -> bool:
    """Whether layers are to be compiled."""
    asked = getattr(training, "torch_compile", False)
    if asked and training.gradient_checkpointing:
        raise RecipeError(
            "torch_compile: layers that are computed again in the backward pass run uncompiled: set `gradient_checkpointing: "
            "false`, or `torch_compile: false`"
        )
    return asked


def compile_layers(model: nn.Module, training: Any) -> bool:
    """Compiles, where `torch_compile` asks for it, each layer of a decoder by itself and in place; returns whether it did.

    Transformers' Trainer would compile the whole: TRL's LM head in tiles cannot be traced without Triton, and hooks on the
    trunk, by which PPO reads its states, would have it compiled again at every step. Accelerate's own way by layers makes a
    second model of the same weights, and only one of the two is told when an evaluation begins.

    Args:
        model: without adapters, or with them.
        training: the arguments of the trainer, which must not be asked to compile once more: `without_compilation`.

    Raises:
        RecipeError: beside gradient checkpointing, within which PyTorch compiles nothing.
    """
    if not _is_compiled(training):
        return False
    trunk = model.get_base_model().base_model if isinstance(model, PeftModel) else model.base_model
    for blocks in filter(is_repeated_blocks, trunk.children()):
        for block in blocks:
            block.compile(backend=training.torch_compile_backend, mode=training.torch_compile_mode)
    return True


def without_compilation(training: Any) -> Any:
    """The arguments for a trainer whose model is compiled already; a copy."""
    if not training.torch_compile:
        return training
    rest = copy.copy(training)
    rest.torch_compile, rest.torch_compile_backend, rest.torch_compile_mode = False, None, None
    return rest


@contextlib.contextmanager
def eager_mode(model: nn.Module) -> Iterator[None]:
    """Within, compiled layers run as they were: each role, and each length in sampling, would have them compiled anew."""
    if not any(module._compiled_call_impl is not None for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def keep_forward(training: Any) -> None:
    """Has Liger replace layers alone, and not the model's forward pass, which ours and TRL's losses call in their own way."""
    if training.use_liger_kernel:
        training.liger_kernel_config = {**(training.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
