"""Whether an answer is right, abstains, or is made up."""

import ast
import contextlib
import json
from collections.abc import Sequence
from typing import Any

KINDS = ("right", "abstained", "made_up")
ABSTENTIONS = ("I do not know",)


def accepted_answers(reference: Any) -> list[str]:
    """Return the answers that a `reference` accepts, stripped; none if it is empty.

    It is a text, a list of texts, or such a list written as text, as in a CSV file.

    Raises:
        ValueError: for anything else.
    """
    if reference is None:
        return []
    texts = [reference] if isinstance(reference, str) else reference
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str | None) for text in texts):
        raise ValueError(f"{reference!r:.80} is neither a text nor a list of texts")
    if isinstance(reference, str) and reference.strip().startswith("["):
        texts = [reference, *_read_list(reference)]
    return [text.strip() for text in texts if text and text.strip()]


def _read_list(text: str) -> list[str]:
    """Return the texts of a list in JSON or Python, and none of anything else."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            values = read(text.strip())
            if isinstance(values, list) and all(isinstance(value, str | None) for value in values):
                return values
    return []


def kinds_of(answers: Sequence[str], references: Sequence[Any], abstentions: Sequence[str] = ABSTENTIONS) -> list[str]:
    """Return which of `KINDS` each answer is, by what its reference accepts."""
    beginnings = tuple(normalise(phrase) for phrase in abstentions)
    return [judge(answer, accepted_answers(one), beginnings) for answer, one in zip(answers, references, strict=True)]


def judge(answer: str, accepted: Sequence[str], beginnings: tuple[str, ...]) -> str:
    """Return the kind of an answer, after normalising it and those that are accepted.

    It abstains if it starts with one of `beginnings`, which are normalised already.
    """
    if normalise(answer).startswith(beginnings):
        return "abstained"
    return "right" if normalise(answer) in map(normalise, accepted) else "made_up"


def normalise(answer: str) -> str:
    """Return the text in lower case, without outer punctuation and double spaces."""
    return " ".join(answer.lower().split()).strip(" .,;:!?\"'")
