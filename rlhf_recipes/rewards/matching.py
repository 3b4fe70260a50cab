"""Whether an answer is right, abstains, or is made up."""

from collections.abc import Sequence

KINDS = ("right", "abstained", "made_up")
ABSTENTIONS = ("I do not know",)


def kinds_of(answers: Sequence[str], references: Sequence[str], abstentions: Sequence[str] = ABSTENTIONS) -> list[str]:
    """Return which of `KINDS` each answer is."""
    beginnings = tuple(normalise(phrase) for phrase in abstentions)
    return [judge(*pair, beginnings) for pair in zip(answers, references, strict=True)]


def judge(answer: str, reference: str, beginnings: tuple[str, ...]) -> str:
    """Return the kind of an answer, after normalising it and the reference.

    It abstains if it starts with one of `beginnings`, which are normalised already.
    """
    if normalise(answer).startswith(beginnings):
        return "abstained"
    return "right" if normalise(answer) == normalise(reference) else "made_up"


def normalise(answer: str) -> str:
    """Return the text in lower case, without outer punctuation and double spaces."""
    return " ".join(answer.lower().split()).strip(" .,;:!?\"'")
