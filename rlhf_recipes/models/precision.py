"""Exact gradients through 4-bit weights, and adapters that stay in fp32."""

import contextlib
import logging
from collections.abc import Iterator

from rlhf_recipes.core.errors import RecipeError

import torch
from transformers import Trainer

logger = logging.getLogger(__name__)


def disable_cpu_4bit_repacking(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    Version 0.50 repacks them in place at the first forward pass in eval mode. From then on the frozen layers pass no gradient,
    silently: training goes wrong after its first evaluation or rollout (`tests/models/test_loading.py` shows it).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_4bit_shapes(model: torch.nn.Module, path: str) -> None:
    """Refuse 4-bit matrices on a CPU with sides that are not multiples of 32.

    Raises:
        RecipeError: names the first of them.
    """
    if model.device.type != "cpu":
        return
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and (module.in_features % 32 or module.out_features % 32):
            raise RecipeError(
                f"load_in_4bit: {path}: {name} is {module.in_features} x {module.out_features}, and on a CPU bitsandbytes "
                "needs multiples of 32. Fix: set `load_in_4bit: false`, or use a GPU"
            )


def check_quantised_share(model: torch.nn.Module, key: str, path: str) -> None:
    """Refuse a model if most weights are not quantised; warn if many are not.

    bitsandbytes quantises plain linear layers only: neither experts, which are tensors of three dimensions, nor Falcon's own
    class. Embeddings and the LM head are not counted: it leaves them alone in every model.

    Raises:
        RecipeError: below a half, with the share and the largest such weights.
    """
    heads = {id(module) for module in (model.get_output_embeddings(), getattr(model, "score", None)) if module is not None}
    quantised, others = 0, {}
    for place, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            quantised += module.in_features * module.out_features
        elif not isinstance(module, torch.nn.Embedding) and id(module) not in heads:
            own = module.named_parameters(place, recurse=False)
            others |= {name: weight.numel() for name, weight in own if weight.ndim > 1}
    share = quantised / max(quantised + sum(others.values()), 1)
    if share > 0.9:
        return
    largest = ", ".join(sorted(others, key=others.get, reverse=True)[:2])
    message = f"{key}: {path}: {share:.0%} of its layers' weights are quantised, and the others ({largest}, ...) are not"
    if share < 0.5:
        raise RecipeError(f"{message}. Fix: set `{key}: false` if it fits into memory so, or name a model without experts")
    logger.warning(message)


@contextlib.contextmanager
def preserve_param_dtypes(model: torch.nn.Module) -> Iterator[None]:
    """Restore the types and values of weights that are cast inside the block.

    TRL's trainers cast all trainable weights on a quantised base to bf16. The frozen reference, copied before, stays in fp32. A
    policy rounded to bf16 would differ from it, and KL would not be 0 at the first step. Weights that are created inside the
    block are left to `keep_adapter_in_fp32`.
    """
    before = {name: weight.data for name, weight in model.named_parameters()}
    yield
    for name, weight in model.named_parameters():
        if name in before and weight.dtype != before[name].dtype:
            weight.data = before[name].to(weight.device)


def keep_adapter_in_fp32(trainer: Trainer) -> None:
    """Cast an adapter that TRL's trainer created on a quantised base back from bf16.

    AdamW's steps are often too small for bf16, and PEFT loads adapters in fp32, so a resumed run would continue in another
    type. Call it between the trainer's construction and `train()`. Does nothing on a base that is not quantised, and under
    DeepSpeed and FSDP 1, which need one type for all weights that they gather.
    """
    model = trainer.model
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    fsdp = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if not quantised or trainer.is_deepspeed_enabled or (fsdp and fsdp.fsdp_version == 1):
        return
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
