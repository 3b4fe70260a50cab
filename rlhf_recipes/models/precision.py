"""Number types: exact gradients through 4-bit weights, and adapters that stay in fp32."""

import contextlib
from collections.abc import Iterator

from rlhf_recipes.core.errors import RecipeError

import torch
from transformers import (
    Trainer,
)


def disable_cpu_4bit_repacking(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    Version 0.50 does so in place at the first forward pass in eval mode; afterwards the layer passes no gradient on, silently:
    training goes wrong after its first evaluation or rollout. See `tests/test_models.py`.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def preserve_param_dtypes(model: torch.nn.Module) -> Iterator[None]:
    """Undoes what happens within to the types of weights: TRL's trainers cast what is trainable on a quantised base to bf16.

    A rounded policy would differ from its reference, which is frozen and not rounded. Weights that are new afterwards, as those
    of an adapter that the trainer made itself, are left to `keep_adapter_in_fp32`.
    """
    before = {name: weight.data for name, weight in model.named_parameters()}
    yield
    for name, weight in model.named_parameters():
        if name in before and weight.dtype != before[name].dtype:
            weight.data = before[name].to(weight.device)


def keep_adapter_in_fp32(trainer: Trainer) -> None:
    """Undoes the cast to bf16 that TRL's trainers give to an adapter that they make themselves on a quantised base.

    What was there keeps its values by `preserve_param_dtypes`, however it is launched; these are fresh, and need only the
    type. AdamW's steps are often too small for bf16 to represent, and PEFT loads an adapter in fp32: a run resumed from a
    checkpoint would go on in another type than it began in. It costs two bytes more a weight of the adapter, and two or four
    in the optimizer. Call it between the trainer's construction and `train()`; it does nothing to models that are not
    quantised, nor under FSDP and DeepSpeed, which want one type for all that they gather.
    """
    model = trainer.model
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    fsdp = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if not quantised or trainer.is_deepspeed_enabled or (fsdp and fsdp.fsdp_version == 1):
        return
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def check_4bit_shapes(model: torch.nn.Module, path: str) -> None:
    """Refuse 4-bit matrices on a CPU whose sides are no multiples of 32."""
    if model.device.type != "cpu":
        return
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and (module.in_features % 32 or module.out_features % 32):
            sides = f"{module.in_features} x {module.out_features}"
            raise RecipeError(
                f"load_in_4bit: {path}: {name} is {sides}, and on a CPU bitsandbytes needs sides that are multiples of 32"
            )
