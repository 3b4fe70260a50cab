"""Fingerprints of base models and adapters, by which they are recognised."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import ADAPTER, read_json
from rlhf_recipes.models.backbone import backbone, base_name, base_of
from rlhf_recipes.models.weights import read_weights

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers.integrations import is_deepspeed_zero3_enabled

logger = logging.getLogger(__name__)
_ADAPTER_PARTS = ("lora_", "trainable_tokens_", ".modules_to_save.")  # in the names of weights that PEFT adds
_SCALING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")  # of `adapter_config.json`
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
    network = backbone(model)
    embedding = network.get_input_embeddings()
    if isinstance(embedding, AuxiliaryTrainingWrapper):
        embedding = embedding.original_module
    if isinstance(embedding, BaseTunerLayer):
        embedding = embedding.get_base_layer()
    weights, matrices = {"embedding": embedding.weight}, {}
    for name, weight in network.named_parameters():
        if weight is not embedding.weight and not any(part in name for part in _ADAPTER_PARTS):
            group = weights if weight.ndim == 1 else matrices
            group[name.replace("base_layer.", "").replace("original_module.", "")] = weight
    return {"dimensions": dimensions, "weights": _digest(weights), "matrices": _digest(matrices)}


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


def check_base(where: str | Path, trained_on: str | None, record: dict[str, Any], model: torch.nn.Module) -> None:
    """Refuse a base that an adapter was not trained on.

    The fingerprint in the record decides, since a base may be moved or renamed; another name gives a warning. Where no weights
    can be compared, the names must agree. Where only embeddings can, a base with a merged adapter may have the same.

    Args:
        where: the key and folder of the adapter, for messages.
        trained_on: the base that the adapter's configuration names.
        record: content of the `reward.json` or `recipe.json` beside the adapter.
        model: the base in memory.

    Raises:
        RecipeError: names both bases and the difference.
    """
    recorded = (record.get("base_model") or {}).get("fingerprint") or {}
    loaded, name = fingerprint(model), base_name(model)
    if difference := _difference(recorded, loaded):
        raise RecipeError(
            f"{where}: was trained on {trained_on}, and the base in memory, {name}, is another: {difference}. Fix: name the "
            "base that it was trained on, or train it on this one"
        )
    compared = [part for part in ("weights", "matrices") if recorded.get(part) and loaded[part]]
    if trained_on and Path(trained_on).name == Path(name).name:
        return
    message = f"{where}: was trained on {trained_on}, and the base in memory is {name}"
    if len(compared) == 2:
        logger.warning("%s, which has the same weights", message)
        return
    if not compared:
        raise RecipeError(
            f"{message}: their weights cannot be compared, so their names must agree. Fix: name the base that it was trained "
            "on (a moved one is recognised by its weights in float32 or bfloat16)"
        )
    logger.warning(
        "%s: their embeddings are equal, and their linear layers cannot be compared (quantised, or not recorded). If an "
        "adapter was merged into one of them, results are wrong: name the other",
        message,
    )


def _difference(recorded: dict[str, Any], loaded: dict[str, Any]) -> str:
    """Return how two fingerprints differ in what both have, or ""."""
    dimensions = recorded.get("dimensions") or loaded["dimensions"]
    differences = [
        f"{name} {dimensions.get(name)} against {value}"
        for name, value in loaded["dimensions"].items()
        if dimensions.get(name) != value
    ]
    for part, text in (("weights", "other weights"), ("matrices", "other weights in the linear layers")):
        if not differences and recorded.get(part) and loaded[part] and recorded[part] != loaded[part]:
            differences = [text]
    return ", ".join(differences)


def adapter_fingerprint(folder: str | Path) -> str | None:
    """Return a digest of the change that a saved adapter makes; None if it makes none.

    A LoRA adapter of which no B was trained leaves its base as it is.

    Raises:
        RecipeError: as `read_weights`.
    """
    weights = read_weights(Path(folder) / ADAPTER)
    effects = {name: weight for name, weight in weights.items() if "lora_A" not in name and "lora_embedding_A" not in name}
    if all("lora_B" in name or "lora_embedding_B" in name for name in effects) and not any(map(torch.any, effects.values())):
        return None
    config = read_json(Path(folder) / "adapter_config.json")
    digest = hashlib.sha256(json.dumps([config.get(name) for name in _SCALING]).encode())
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
