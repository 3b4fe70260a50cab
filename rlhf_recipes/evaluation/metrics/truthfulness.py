"""Shares of answers that are right, that abstain, and that are made up."""

from collections.abc import Sequence

from rlhf_recipes.evaluation.metrics.base import TEXT, metric
from rlhf_recipes.rewards.matching import ABSTENTIONS, KINDS, kinds_of


def truthfulness(
    answers: Sequence[str],
    references: Sequence[str],
    abstentions: Sequence[str] = ABSTENTIONS,
    known: Sequence[bool] | None = None,
) -> dict[str, float | None]:
    """Return the share of each kind of answer.

    Args:
        answers: (N,) answers.
        references: (N,) right answers.
        abstentions: How an answer begins that abstains.
        known: (N,) whether the model could answer each question. Adds `over_abstained`.

    Returns:
        `right`, `abstained`, `made_up`; `over_abstained`: the share of abstentions on questions that the model could
        answer, None where there are none.

    Raises:
        ValueError: No answers, or different lengths.
    """
    if not answers:
        raise ValueError("There are no answers to judge.")
    kinds = kinds_of(answers, references, abstentions)
    result = {kind: kinds.count(kind) / len(kinds) for kind in KINDS}
    if known is not None:
        answerable = [kind for kind, is_known in zip(kinds, known, strict=True) if is_known]
        result["over_abstained"] = answerable.count("abstained") / len(answerable) if answerable else None
    return result


Truthfulness = metric(
    "Truthfulness",
    truthfulness,
    """Shares of answers that are right, that abstain, and that are made up (neither).

    `predictions` are answers, `references` the right ones. Options as in `truthfulness`.

        >>> Truthfulness().compute(predictions=["Larkhill."], references=["larkhill"])
        {'right': 1.0, 'abstained': 0.0, 'made_up': 0.0}
    """,
    predictions=TEXT,
    references=TEXT,
)
