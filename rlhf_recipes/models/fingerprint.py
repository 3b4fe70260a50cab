"""Fingerprints of base models, by which an adapter knows its base."""

import hashlib
from typing import Any

from rlhf_recipes.models.backbone import backbone, base_of

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers.integrations import is_deepspeed_zero3_enabled

_OF_ADAPTERS = ("lora_", "trainable_tokens_", ".modules_to_save.")  # in the names of weights that PEFT adds
_DIMENSIONS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """What tells a base from others: its dimensions, and digests of its weights, rounded to bf16.

    `weights` covers what quantisation leaves alone, the embeddings and all vectors (norms and biases); `matrices` the rest,
    which is all that merging LoRA changes. Each is the same for a base in fp32 and bf16, as a language model and as a
    classifier, with adapters or without, and None where it cannot be had: both in fp16, where weights are spread over
    devices, and under ZeRO-3, `matrices` in 4 and 8 bits too. The LM head is in neither, since a classifier has none.
    """
    config = base_of(model).config.get_text_config()
    dimensions = {name: getattr(config, name) for name in _DIMENSIONS if getattr(config, name, None) is not None}
    if is_deepspeed_zero3_enabled():
        return {"dimensions": dimensions, "weights": None, "matrices": None}
    weights, matrices = _by_sort(backbone(model))
    return {"dimensions": dimensions, "weights": _digest(weights), "matrices": _digest(matrices)}


def _by_sort(trunk: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of the base that are never quantised, and those that may be, without what adapters add."""
    embedding = trunk.get_input_embeddings()
    if isinstance(embedding, AuxiliaryTrainingWrapper):
        embedding = embedding.original_module
    if isinstance(embedding, BaseTunerLayer):
        embedding = embedding.get_base_layer()
    weights, matrices = {"embedding": embedding.weight}, {}
    for name, weight in trunk.named_parameters():
        if weight is not embedding.weight and not any(part in name for part in _OF_ADAPTERS):
            sort = weights if weight.ndim == 1 else matrices
            sort[name.replace("base_layer.", "").replace("original_module.", "")] = weight
    return weights, matrices


def _digest(weights: dict[str, torch.Tensor]) -> str | None:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        packed = getattr(weight, "quant_state", None) is not None  # 4 bits, whatever type they are stored as
        if packed or weight.dtype not in (torch.float32, torch.bfloat16) or weight.is_meta or not weight.numel():
            return None
        bits = weight.detach().to(torch.bfloat16).reshape(-1, weight.shape[-1]).view(torch.int16)
        digest.update(name.encode())
        digest.update(bits.sum(0, dtype=torch.int64).cpu().numpy().tobytes())  # a sum of columns: all of it, in little time
    return digest.hexdigest()
