"""Refuse bases and tokenizers that do not belong together."""

import logging
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.models.backbone import base_name
from rlhf_recipes.models.fingerprint import fingerprint

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_PROBE = "Is 1 + 1 = 2?\nYes: Straße, 东京."


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings.

    Raises:
        RecipeError: with both numbers.
    """
    rows = model.get_input_embeddings().num_embeddings  # under ZeRO-3 the weight itself may be empty
    if len(tokenizer) > rows:
        raise RecipeError(
            f"the vocabulary of the tokenizer in {tokenizer.name_or_path} has {len(tokenizer)} tokens, and "
            f"{model.name_or_path} has embeddings for {rows}. Fix: name a model and a tokenizer that belong together"
        )


def check_base(where: str | Path, trained_on: str | None, record: dict[str, Any], model: torch.nn.Module) -> None:
    """Refuse a base that an adapter was not trained on.

    The fingerprint in the record decides, since a base may be moved or renamed. Where no weights can be compared, the names
    must agree. Where only embeddings can, another name gives a warning: a base with a merged adapter has the same embeddings.

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
    if differences := _differences(recorded, loaded):
        raise RecipeError(
            f"{where}: was trained on {trained_on}, and the base in memory, {name}, is another: {', '.join(differences)}. Fix: "
            "name the base that it was trained on, or train it on this one"
        )
    compared = [part for part in ("weights", "matrices") if recorded.get(part) and loaded[part]]
    if len(compared) == 2 or same_name(trained_on, name):
        return
    message = f"{where}: was trained on {trained_on}, and the base in memory is {name}"
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


def _differences(recorded: dict[str, Any], loaded: dict[str, Any]) -> list[str]:
    """Return the differences of two fingerprints in what both have."""
    dimensions = recorded.get("dimensions") or {}
    differences = [
        f"{name} {dimensions.get(name)} against {value}"
        for name, value in loaded["dimensions"].items()
        if dimensions and dimensions.get(name) != value
    ]
    if differences:
        return differences
    descriptions = {"weights": "other weights", "matrices": "other weights in the linear layers"}
    changed = [
        text for part, text in descriptions.items() if recorded.get(part) and loaded[part] and recorded[part] != loaded[part]
    ]
    return changed[:1]


def same_name(one: str | None, other: str | None) -> bool:
    """Return whether two names may mean one base."""
    return bool(one and other) and Path(one).name == Path(other).name


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer or chat template that differs from the one saved in `folder`.

    Raises:
        RecipeError: names both tokenizers and the differences.
    """
    try:
        saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain `Exception`
        raise RecipeError(
            f"{folder}: no readable tokenizer to compare with the policy's ({first_line(error)}). Fix: save it there"
        ) from error
    differences = []
    if saved.get_vocab() != tokenizer.get_vocab():
        differences.append(f"vocabulary ({len(saved)} tokens against {len(tokenizer)})")
    if saved.chat_template != tokenizer.chat_template:
        differences.append(f"chat template ({saved.chat_template!r:.60} against {tokenizer.chat_template!r:.60})")
    for name in ("bos_token", "eos_token"):
        if getattr(saved, name) != getattr(tokenizer, name):
            differences.append(f"{name} ('{getattr(saved, name)}' against '{getattr(tokenizer, name)}')")
    if not differences and saved(_PROBE)["input_ids"] != tokenizer(_PROBE)["input_ids"]:
        differences.append("the way it splits text into tokens")
    if differences:
        raise RecipeError(
            f"the tokenizers in {folder} and of the model in use, {tokenizer.name_or_path}, differ in "
            f"{', '.join(differences)}. Fix: train both with one tokenizer"
        )
