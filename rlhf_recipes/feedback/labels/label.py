"""A label: what one labeller says about one group, and its rules."""

import unicodedata
from dataclasses import dataclass, replace

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.groups import Group

MAX_DEMONSTRATION, MAX_NOTE, MAX_NAME = 20_000, 2_000, 60  # characters


class InvalidLabelError(RecipeError):
    """A label, or the name of a labeller, that cannot be stored."""


class AlreadyLabelledError(RecipeError):
    """The labeller already has a label on this group."""


class NameTakenError(RecipeError):
    """A labeller of this name already exists."""


@dataclass(frozen=True)
class Label:
    """What one labeller says about one group.

    Parameters:
        group: id of the group.
        labeller: name of the labeller.
        ranks: the rank of each of the K completions: 1 is the best, equal numbers tie, None marks an unusable one. None in
            place of the list if the labeller skipped the comparison.
        demonstration: the answer as it should have been, or None.
        note: free text, or None.
        at: time of storing, UTC, ISO 8601; empty before.
    """

    group: str
    labeller: str
    ranks: list[int | None] | None = None
    demonstration: str | None = None
    note: str | None = None
    at: str = ""


def normalize(label: Label, group: Group) -> Label:
    """Return the label with ranks without gaps, and stripped texts or None.

    Raises:
        InvalidLabelError: if the ranks do not fit the group, or a text or the name is too long.
    """
    return replace(
        label,
        labeller=clean_name(label.labeller),
        ranks=None if label.ranks is None else _normalize_ranks(label.ranks, group),
        demonstration=_clean_text(label.demonstration, "demonstration", MAX_DEMONSTRATION),
        note=_clean_text(label.note, "note", MAX_NOTE),
    )


def _normalize_ranks(ranks: list[int | None], group: Group) -> list[int | None]:
    texts = group.texts()
    if len(ranks) != len(texts):
        problem = f"{len(ranks)} for the {len(texts)} completions of group '{group.id}'. Fix: give one each"
        raise InvalidLabelError(f"ranks: {problem}")
    if any(rank is not None and (type(rank) is not int or rank < 1) for rank in ranks):
        raise InvalidLabelError(f"ranks: {ranks}: a rank is a whole number from 1, or null for an unusable completion")
    rank_of: dict[str, int | None] = {"": None}
    if any(rank_of.setdefault(text, rank) != rank for text, rank in zip(texts, ranks, strict=True)):
        raise InvalidLabelError(f"ranks: {ranks}: an empty completion is always unusable, and equal ones share a rank")
    order = sorted({rank for rank in ranks if rank is not None})
    return [None if rank is None else order.index(rank) + 1 for rank in ranks]


def _clean_text(text: str | None, key: str, limit: int) -> str | None:
    text = (text or "").strip()
    if len(text) > limit:
        raise InvalidLabelError(f"{key}: {len(text)} characters. Fix: write {limit} at most")
    return text or None


def clean_name(name: str) -> str:
    """Return a labeller's name in one spelling: NFKC, single spaces.

    Raises:
        InvalidLabelError: if it is empty, too long, or not printable.
    """
    clean = " ".join(unicodedata.normalize("NFKC", name).split())
    if not clean or len(clean) > MAX_NAME or not clean.isprintable():
        raise InvalidLabelError(f"name: {name[:MAX_NAME]!r}: not a name. Fix: give 1 to {MAX_NAME} printable characters")
    return clean
