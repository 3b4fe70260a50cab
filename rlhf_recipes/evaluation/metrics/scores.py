"""The distribution of scores, and their correlation with length.

Results are JSON-serialisable: an undefined number is None, never NaN.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

from rlhf_recipes.evaluation.metrics.base import NUMBER, metric
from rlhf_recipes.evaluation.metrics.intervals import Floats, Integers, codes_of, columns_of

import numpy as np
from numpy.typing import ArrayLike


def score_length(scores: ArrayLike, lengths: ArrayLike, *, groups: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """Return the correlation of score and length, overall and within prompts.

    Prompts differ in how long an answer they need and in how well they are answered, which alone makes a correlation
    (Singhal et al. 2023). The one within prompts is free of it: it correlates deviations from the prompt's mean (Pearson),
    or deviations of the ranks among the prompt's answers (Spearman).

    Args:
        scores: (N,) scores of answers.
        lengths: (N,) their lengths, in tokens.
        groups: (N,) prompt or ranking of each answer. None: each has a prompt to itself.

    Returns:
        `pearson`, `spearman`, `n`; `pearson_within`, `spearman_within`, `n_within`: of the answers that share a group. None
        where scores or lengths do not vary.

    Raises:
        ValueError: No answers, different lengths, or numbers that are not finite.
    """
    scores, lengths = columns_of(scores=scores, lengths=lengths)
    members = [rows for rows in _rows_by_group(codes_of(groups, len(scores))) if len(rows) > 1]
    deviations = [np.concatenate([_centred(x[rows]) for rows in members] or [[]]) for x in (scores, lengths)]
    positions = [np.concatenate([_centred(_ranks(x[rows])) for rows in members] or [[]]) for x in (scores, lengths)]
    return {
        "pearson": _pearson(scores, lengths),
        "spearman": _pearson(_ranks(scores), _ranks(lengths)),
        "n": len(scores),
        "pearson_within": _pearson(*deviations),
        "spearman_within": _pearson(*positions),
        "n_within": sum(map(len, members)),
    }


ScoreLength = metric(
    "ScoreLength",
    score_length,
    """Pearson's and Spearman's correlation of score and length, overall and within prompts.

    `predictions` are scores, `references` lengths. Options as in `score_length`.

        >>> ScoreLength().compute(predictions=[0.0, 1.0, 5.0], references=[10, 20, 30])["spearman"]
        1.0
    """,
    predictions=NUMBER,
    references=NUMBER,
)


def score_distribution(scores: ArrayLike, bins: int = 20) -> dict[str, Any]:
    """Return the distribution of scores.

    Args:
        scores: (N,).
        bins: Of the histogram.

    Returns:
        `n`, `mean`, `std` (divided by N), `skew` (the third standardised moment; None for constant scores), `quantiles`, and
        `histogram`: `edges` (bins + 1,) and `counts` (bins,).

    Raises:
        ValueError: No scores, or numbers that are not finite.
    """
    (scores,) = columns_of(scores=scores)
    deviations = _centred(scores)
    std = math.sqrt(np.mean(deviations**2))
    quantiles = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    counts, edges = np.histogram(scores, bins)
    return {
        "n": len(scores),
        "mean": float(scores.mean()),
        "std": std,
        "skew": float(np.mean((deviations / std) ** 3)) if std else None,
        "quantiles": dict(zip(map(str, quantiles), np.quantile(scores, quantiles).tolist(), strict=True)),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _rows_by_group(codes: Integers) -> list[Integers]:
    return np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])


def _ranks(values: Floats) -> Floats:
    """Return (N,) ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def _centred(values: Floats) -> Floats:
    """Return (N,) deviations from the mean, exactly 0 for constants.

    Plain subtraction may miss 0 by rounding.
    """
    shifted = values - values[:1]
    return shifted - shifted.mean() if len(values) else shifted


def _pearson(first: Floats, second: Floats) -> float | None:
    first, second = _centred(first), _centred(second)
    norms = math.sqrt((first @ first) * (second @ second))
    return float(np.clip(first @ second / norms, -1, 1)) if norms else None
