"""Options for speed: kernels, compilation and vLLM."""

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.backbone import backbone

import torch
from accelerate.utils.other import is_repeated_blocks
from torch import nn
from trl import ModelConfig
from trl.import_utils import is_vllm_available


def check_kernel_options(arguments: ModelConfig, training: Any) -> None:
    """Check the model's and the trainer's options for speed before a model is loaded.

    Raises:
        RecipeError: if a package that an option needs is missing, or the option cannot work.
    """
    attention = arguments.attn_implementation or ""
    option = f"attn_implementation: {attention}" if "/" in attention else None
    if (getattr(training, "model_init_kwargs", None) or {}).get("use_kernels"):
        option = "model_init_kwargs: use_kernels"
    if option and importlib.util.find_spec("kernels") is None:
        fix = "`pip install --editable '.[kernels]'`, or leave the key out"
        raise RecipeError(f"{option}: the package `kernels` is not installed. Fix: {fix}")
    on_cpu = getattr(training, "use_cpu", False) or not torch.accelerator.is_available()
    if attention == "flex_attention" and hasattr(training, "learning_rate") and on_cpu:
        raise RecipeError("attn_implementation: flex_attention has no backward pass on a CPU. Fix: leave the key out")
    check_vllm(training, bool(arguments.load_in_4bit or arguments.load_in_8bit))
    _compiles(training)


def check_vllm(training: Any, quantised: bool) -> None:
    """Check that vLLM is installed and can be sent new weights.

    A copy of the base that vLLM quantises itself cannot.
    """
    if not getattr(training, "use_vllm", False):
        return
    if not is_vllm_available():
        raise RecipeError(
            "use_vllm: vLLM is not installed. Fix: `pip install --editable '.[vllm]'` on a machine with a GPU, or "
            "`use_vllm: false`"
        )
    if quantised and training.vllm_mode == "colocate":
        raise RecipeError(
            "vllm_mode: colocate: TRL has vLLM quantise its copy of the base, and no new weights can be sent to it. Fix: "
            "`vllm_mode: server`, which holds the model in 16 bits on another card; `load_in_4bit: false`; or `use_vllm: false`"
        )


def _compiles(training: Any) -> bool:
    """Return whether to compile layers; gradient checkpointing would undo it."""
    if not getattr(training, "torch_compile", False):
        return False
    if training.gradient_checkpointing:
        raise RecipeError(
            "torch_compile: checkpointed layers run uncompiled. Fix: `gradient_checkpointing: false`, or `torch_compile: false`"
        )
    return True


def compile_layers(model: nn.Module, training: Any) -> bool:
    """Compile each layer in place if `torch_compile` is set, and return whether it is.

    Transformers' Trainer would compile the whole model: TRL's fused LM head cannot be traced without Triton, and PPO's hooks on
    the backbone would compile it again at every step. Accelerate's regional compilation makes a second model of the same
    weights, and `eval()` reaches only one of the two. Pass the trainer `without_compilation(training)`.
    """
    if not _compiles(training):
        return False
    for blocks in filter(is_repeated_blocks, backbone(model).children()):
        for block in blocks:
            block.compile(backend=training.torch_compile_backend, mode=training.torch_compile_mode)
    return True


def without_compilation(training: Any) -> Any:
    """Return a copy of the arguments for a trainer whose model is compiled already."""
    rest = copy.copy(training)
    if training.torch_compile:
        rest.torch_compile, rest.torch_compile_backend, rest.torch_compile_mode = False, None, None
    return rest


@contextlib.contextmanager
def eager_mode(model: nn.Module) -> Iterator[None]:
    """Run compiled layers uncompiled: each role and length would compile them again."""
    if not any(module._compiled_call_impl is not None for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def keep_forward(training: Any) -> None:
    """Let Liger replace layers, but not the forward pass, which TRL replaces."""
    if training.use_liger_kernel:
        training.liger_kernel_config = {**(training.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
