"""The seam to vLLM: which weights it is sent before it samples."""

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
    """Has the trainer send vLLM what `policy_weights` makes, where roles share a base.

    TRL merges the active adapter into the base, sends that, and takes the adapter out again. What is left of the base has been
    rounded twice: each time it is another base, for all other roles too, and one in 4 bits is quantised anew. What it sends of
    one in 4 bits is their bytes. Where weights are sharded (FSDP, DeepSpeed's third stage) they have to be gathered, and TRL's
    way stays.
    """
    sharded = trainer.is_fsdp_enabled or trainer.accelerator.state.deepspeed_plugin is not None
    if trainer.use_vllm and isinstance(trainer.model, PeftModel) and not sharded:
        trainer.vllm_generation._iter_named_params = functools.partial(policy_weights, trainer.model)


@torch.no_grad()
def policy_weights(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model that the policy's adapter makes of its base, one at a time, by their names in the base.

    Nothing of the model changes. What is quantised comes in the type of what is not.

    Args:
        model: whose adapter `POLICY` is sent; of others nothing is.

    Raises:
        RecipeError: for an adapter that is neither LoRA nor a copy of a module, and for one on embeddings that vLLM ties to the
            LM head.
    """
    base = base_of(model)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if base.config.get_text_config().tie_word_embeddings and any(isinstance(end, _ADAPTED) for end in ends):
        raise RecipeError(
            "use_vllm: an adapter on embeddings that are the LM head too (`tie_word_embeddings`) cannot be sent: vLLM would "
            "have it in both: set `use_vllm: false`, or leave `embed_tokens` and `lm_head` out of `lora_target_modules` and "
            "`lora_modules_to_save`"
        )
    yield from _weights(base, "", model.dtype, set())


def _weights(module: nn.Module, prefix: str, dtype: torch.dtype, sent: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Those of a module and of all in it; a weight that is tied to another is sent once, as checkpoints have it."""
    if isinstance(module, ModulesToSaveWrapper):
        own = POLICY in module.modules_to_save
        module = module.modules_to_save[POLICY] if own else module.original_module
    if isinstance(module, LoraLayer) and hasattr(module, "get_delta_weight"):
        yield from _adapted(module, prefix, dtype)
        return
    if isinstance(module, _ADAPTED):
        kind = type(module).__name__
        raise RecipeError(f"use_vllm: {prefix.removesuffix('.')}: {kind} cannot be sent: set `use_vllm: false`")
    for name, weight in module.named_parameters(recurse=False):
        if id(weight) not in sent:
            sent.add(id(weight))
            quantised = name == "weight" and type(weight) is not nn.Parameter
            yield f"{prefix}{name}", dequantize_module_weight(module).to(dtype) if quantised else weight.data
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.", dtype, sent)


def _adapted(layer: LoraLayer, prefix: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights of a layer with LoRA, added in fp32 at least, and rounded once."""
    base = layer.get_base_layer()
    weight = dequantize_module_weight(base).data
    kept = weight.dtype if type(base.weight) is nn.Parameter else dtype
    adapted = POLICY in layer.lora_A or POLICY in layer.lora_embedding_A
    if adapted and POLICY in layer.lora_variant:  # DoRA
        weight = layer.lora_variant[POLICY].merge_safe(layer, POLICY, weight)
    elif adapted:
        weight = weight.float() + layer.get_delta_weight(POLICY).float()
    yield f"{prefix}weight", weight.to(kept)
    bias = getattr(base, "bias", None)
    if bias is not None:
        own = layer.lora_B[POLICY].bias * layer.scaling[POLICY] if adapted and layer.lora_bias.get(POLICY) else 0.0
        yield f"{prefix}bias", (bias + own).to(bias.dtype)
