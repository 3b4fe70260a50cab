"""The policy's weights that vLLM is sent before it samples."""

import functools
from collections.abc import Iterator

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.backbone import base_of
from rlhf_recipes.models.roles import POLICY

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from trl import GRPOTrainer

_ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def send_policy_alone(trainer: GRPOTrainer) -> None:
    """Make the trainer send vLLM `policy_weights` where roles share a base.

    TRL merges the active adapter into the base, sends the result, and unmerges. The rounding changes the base for every role;
    a 4-bit base is quantised again, and sent as packed bytes. FSDP and DeepSpeed keep TRL's way, which gathers sharded weights.
    """
    sharded = trainer.is_fsdp_enabled or trainer.accelerator.state.deepspeed_plugin is not None
    if trainer.use_vllm and isinstance(trainer.model, PeftModel) and not sharded:
        trainer.vllm_generation._iter_named_params = functools.partial(policy_weights, trainer.model)


@torch.no_grad()
def policy_weights(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's weights, with the policy's adapter added, by name.

    The model does not change. Quantised weights are dequantised to the type of the others.

    Args:
        model: with the adapter `POLICY`; others are not sent.

    Raises:
        RecipeError: for an adapter that is neither LoRA nor a copy of a module, or on embeddings tied to the LM head.
    """
    base = base_of(model)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if base.config.get_text_config().tie_word_embeddings and any(isinstance(end, _ADAPTED) for end in ends):
        raise RecipeError(
            "use_vllm: an adapter on tied embeddings would reach the LM head too. Fix: `use_vllm: false`, or leave "
            "`embed_tokens` and `lm_head` out of `lora_target_modules` and `lora_modules_to_save`"
        )
    yield from _weights(base, "", model.dtype, set())


def _weights(module: nn.Module, prefix: str, dtype: torch.dtype, sent: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a module and its children; tied weights come once."""
    if isinstance(module, ModulesToSaveWrapper):
        copies = module.modules_to_save
        module = copies[POLICY] if POLICY in copies else module.original_module  # noqa: SIM401 - it is no dictionary
    if isinstance(module, LoraLayer) and hasattr(module, "get_delta_weight"):
        yield from _adapted(module, prefix, dtype)
        return
    if isinstance(module, _ADAPTED):
        kind = type(module).__name__
        raise RecipeError(f"use_vllm: {prefix.removesuffix('.')}: {kind} cannot be sent. Fix: `use_vllm: false`")
    for name, weight in module.named_parameters(recurse=False):
        if id(weight) not in sent:
            sent.add(id(weight))
            quantised = name == "weight" and type(weight) is not nn.Parameter
            yield f"{prefix}{name}", dequantize_module_weight(module).to(dtype) if quantised else weight.data
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.", dtype, sent)


def _adapted(layer: LoraLayer, prefix: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a layer with LoRA, added in fp32 and rounded once."""
    base = layer.get_base_layer()
    weight = dequantize_module_weight(base).data
    sent_dtype = weight.dtype if type(base.weight) is nn.Parameter else dtype
    adapted = POLICY in layer.lora_A or POLICY in layer.lora_embedding_A
    if adapted and POLICY in layer.lora_variant:  # DoRA
        weight = layer.lora_variant[POLICY].merge_safe(layer, POLICY, weight)
    elif adapted:
        weight = weight.float() + layer.get_delta_weight(POLICY).float()
    yield f"{prefix}weight", weight.to(sent_dtype)
    bias = getattr(base, "bias", None)
    if bias is not None:
        delta = layer.lora_B[POLICY].bias * layer.scaling[POLICY] if adapted and layer.lora_bias.get(POLICY) else 0.0
        yield f"{prefix}bias", (bias + delta).to(bias.dtype)
