"""Refusals of bases and tokenizers that do not belong together."""

import logging
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.models.backbone import base_name
from rlhf_recipes.models.fingerprint import fingerprint

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

logger = logging.getLogger(__name__)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer with words that the model has no embedding for.

    Raises:
        RecipeError: with the size of either vocabulary.
    """
    rows = model.get_input_embeddings().num_embeddings  # not those of its weight, of which ZeRO-3 may leave none
    if len(tokenizer) > rows:
        raise RecipeError(
            f"the vocabulary of the tokenizer in {tokenizer.name_or_path} has {len(tokenizer)} words, and {model.name_or_path} "
            f"has embeddings for {rows}: one of the two belongs to another model"
        )


def check_base(where: str | Path, trained_on: str | None, record: dict[str, Any], model: torch.nn.Module) -> None:
    """Refuses a base on which an adapter was not trained.

    By the fingerprint where the record has one, since a base may be moved and renamed. Where no weights can be compared the
    name decides; where the linear layers cannot, another name is warned of: a base that an adapter was merged into keeps its
    embeddings.

    Args:
        where: the folder of the adapter, for messages.
        trained_on: the base that the adapter's configuration names.
        record: what `reward.json` or `recipe.json` beside it holds.
        model: the base in memory.

    Raises:
        RecipeError: names both bases, and says in what they differ.
    """
    known, here, name = (record.get("base_model") or {}).get("fingerprint") or {}, fingerprint(model), base_name(model)
    if differences := _differences(known, here):
        raise RecipeError(
            f"{where} was trained on {trained_on}, and the base in memory, {name}, is another: {', '.join(differences)}; name "
            "the one that it was trained on, or train it on this one"
        )
    compared = [part for part in ("weights", "matrices") if known.get(part) and here[part]]
    if len(compared) == 2 or same_name(trained_on, name):
        return
    message = f"{where} was trained on {trained_on}, and the base in memory is {name}"
    if not compared:
        raise RecipeError(
            f"{message}: their weights cannot be compared, so their names must agree: name the base that it was trained on "
            "(one that was moved is known again by its weights, in float32 or bfloat16)"
        )
    logger.warning(
        "%s: their embeddings are the same, and their linear layers cannot be compared (quantised now or then, or not "
        "recorded): if an adapter was merged into one of them, name the other, or what comes out is wrong",
        message,
    )


def _differences(known: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """In what two fingerprints differ, as far as both say something."""
    dimensions = known.get("dimensions") or {}
    differences = [
        f"{name} {dimensions.get(name)} against {value}"
        for name, value in here["dimensions"].items()
        if dimensions and dimensions.get(name) != value
    ]
    if not differences:
        both = {part for part in ("weights", "matrices") if known.get(part) and here[part] and known[part] != here[part]}
        differences = ["other weights" if "weights" in both else "other weights in the linear layers"] if both else []
    return differences


def same_name(one: str | None, other: str | None) -> bool:
    """Whether two names of a base may mean one: a Hub name, and the same model in a folder of its name."""
    return bool(one and other) and Path(one).name == Path(other).name


_PROBE = "Is 1 + 1 = 2?\nYes: Straße, 东京."


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer or chat template that differs from those saved with the model in `folder`.

    Raises:
        RecipeError: names both sides, and says in what they differ.
    """
    try:
        own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers' own is nothing more
        raise RecipeError(
            f"{folder}: no tokenizer there that can be read, so none can be compared with the policy's: save it "
            f"({first_line(error)})"
        ) from error
    differences = []
    if own.get_vocab() != tokenizer.get_vocab():
        differences.append(f"vocabulary ({len(own)} tokens against {len(tokenizer)})")
    if own.chat_template != tokenizer.chat_template:
        differences.append(f"chat template ({_shown(own.chat_template)} against {_shown(tokenizer.chat_template)})")
    for name in ("bos_token", "eos_token"):
        if getattr(own, name) != getattr(tokenizer, name):
            differences.append(f"{name} ('{getattr(own, name)}' against '{getattr(tokenizer, name)}')")
    if not differences and own(_PROBE)["input_ids"] != tokenizer(_PROBE)["input_ids"]:
        differences.append("the way it cuts text into tokens")
    if differences:
        raise RecipeError(
            f"the tokenizer in {folder} and that of the model in use, {tokenizer.name_or_path}, differ in "
            f"{', '.join(differences)}: one would not read what the other writes; train both with one"
        )


def _shown(template: str | None, length: int = 60) -> str:
    return repr(template if template is None or len(template) <= length else template[: length - 3] + "...")
