"""Fingerprints of base models, by which an adapter recognises its base."""

import hashlib
from typing import Any

from rlhf_recipes.models.backbone import backbone, base_of

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers.integrations import is_deepspeed_zero3_enabled

_ADAPTER_PARTS = ("lora_", "trainable_tokens_", ".modules_to_save.")  # in the names of weights that PEFT adds
_DIMENSIONS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """Return a base's dimensions and digests of its weights rounded to bf16.

    `weights` covers what quantisation leaves alone: embeddings and vectors (norms, biases). `matrices` covers the rest, which
    is all that merging LoRA changes. Both are equal for a base in fp32 and in bf16, as language model and as classifier, with
    adapters and without. They are None in fp16, on meta devices and under ZeRO-3; `matrices` is None in 4 and 8 bits too. The
    LM head is left out, since a classifier has none.
    """
    config = base_of(model).config.get_text_config()
    dimensions = {name: getattr(config, name) for name in _DIMENSIONS if getattr(config, name, None) is not None}
    if is_deepspeed_zero3_enabled():
        return {"dimensions": dimensions, "weights": None, "matrices": None}
    weights, matrices = _split_weights(backbone(model))
    return {"dimensions": dimensions, "weights": _digest(weights), "matrices": _digest(matrices)}


def _split_weights(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the base's weights that are never quantised, and those that may be."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, AuxiliaryTrainingWrapper):
        embedding = embedding.original_module
    if isinstance(embedding, BaseTunerLayer):
        embedding = embedding.get_base_layer()
    weights, matrices = {"embedding": embedding.weight}, {}
    for name, weight in model.named_parameters():
        if weight is not embedding.weight and not any(part in name for part in _ADAPTER_PARTS):
            group = weights if weight.ndim == 1 else matrices
            group[name.replace("base_layer.", "").replace("original_module.", "")] = weight
    return weights, matrices


def _digest(weights: dict[str, torch.Tensor]) -> str | None:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        packed = getattr(weight, "quant_state", None) is not None  # 4 bits, whatever type stores them
        if packed or weight.dtype not in (torch.float32, torch.bfloat16) or weight.is_meta or not weight.numel():
            return None
        bits = weight.detach().to(torch.bfloat16).reshape(-1, weight.shape[-1]).view(torch.int16)
        digest.update(name.encode())
        digest.update(bits.sum(0, dtype=torch.int64).cpu().numpy().tobytes())  # column sums cover all of it, fast
    return digest.hexdigest()
