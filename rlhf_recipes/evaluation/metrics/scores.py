"""Scores of a reward: agreement with people, and with length; distribution.

Results are JSON-serialisable: an undefined number is None, never NaN. Comparisons of one prompt are not independent, so
intervals resample whole `groups`, which name the prompt of each comparison or ranking (None: each is its own).
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

from rlhf_recipes.evaluation.metrics.base import NUMBER, NUMBERS, metric
from rlhf_recipes.evaluation.metrics.intervals import Floats, Integers, codes_of, columns_of, mean_interval, share_interval

import numpy as np
from numpy.typing import ArrayLike


def pair_accuracy(
    chosen: ArrayLike,
    rejected: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
    margins: ArrayLike | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the share of N comparisons whose chosen answer has the higher score.

    A tie counts one half. `margins` say how much better people found the chosen answers.

    Returns:
        `accuracy`, its 95% `interval` (see `share_interval`), `n`, `groups`, `ties`; `by_predicted_margin`: the same by
        quartile of |chosen - rejected|, with equal margins in one quartile; `by_human_margin`: by quartile of `margins`;
        `by_length`: where the chosen answer is longer, shorter, or as long.

    Raises:
        ValueError: Nothing to compare, different lengths, or numbers that are not finite.
    """
    chosen, rejected = columns_of(chosen=chosen, rejected=rejected)
    codes = codes_of(groups, len(chosen))
    right = preferred(chosen, rejected)

    def share(rows: Any) -> dict[str, Any]:
        return share_of_group(right[rows], codes[rows], seed)

    def by_quartile(values: Floats) -> list[dict[str, Any]]:
        quartile = bin_of(values, np.unique(np.quantile(values, (0.25, 0.5, 0.75))))  # equal values share one
        slices = [quartile == number for number in np.unique(quartile)]
        return [{"low": float(values[rows].min()), "high": float(values[rows].max())} | share(rows) for rows in slices]

    result = share(slice(None)) | {"groups": int(codes.max()) + 1, "ties": int((chosen == rejected).sum())}
    result["by_predicted_margin"] = by_quartile(np.abs(chosen - rejected))
    if margins is not None:
        result["by_human_margin"] = by_quartile(columns_of(chosen=chosen, margins=margins)[1])
    if chosen_lengths is not None or rejected_lengths is not None:
        _, long, short = columns_of(chosen=chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
        longer, signs = np.sign(long - short), {"chosen_longer": 1, "chosen_shorter": -1, "same_length": 0}
        result["by_length"] = {name: share(longer == sign) for name, sign in signs.items()}
    return result


PairAccuracy = metric(
    "PairAccuracy",
    pair_accuracy,
    """Accuracy of scores on comparisons, with a 95% interval, by margin and by length.

    `predictions` are the scores of the chosen answers, `references` those of the rejected ones. Options as in `pair_accuracy`.

        >>> PairAccuracy().compute(predictions=[2.0, 0.5], references=[1.0, 0.5])["accuracy"]
        0.75
    """,
    predictions=NUMBER,
    references=NUMBER,
)


def kendall_tau(first: ArrayLike, second: ArrayLike) -> float | None:
    """Return Kendall's tau-b of two lists of shape (K,); None if one is constant.

    (concordant - discordant) / √((pairs not tied in the first)(pairs not tied in the second)) (Kendall 1945).
    """
    first, second = columns_of(first=first, second=second)
    signs = np.sign(first[:, None] - first), np.sign(second[:, None] - second)
    untied = math.sqrt(np.abs(signs[0]).sum() * np.abs(signs[1]).sum())
    return float((signs[0] * signs[1]).sum() / untied) if untied else None


def ranking_tau(
    scores: Sequence[ArrayLike], ranks: Sequence[ArrayLike], *, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return the mean over rankings of Kendall's tau-b between scores and ranks.

    A ranking has (K,) scores and (K,) human ranks, lower being better. Every ranking counts the same, whatever its length. If
    its scores all tie it counts 0. If its ranks all tie it is left out.

    Returns:
        `tau` and its 95% bootstrap `interval` (None where all groups have one tau); `rankings`: how many count;
        `tied_scores`: how many of these tie in all scores; `tied_ranks`: how many were left out.

    Raises:
        ValueError: Different lengths, or numbers that are not finite.
    """
    codes = codes_of(groups, len(scores))
    rows = list(zip(scores, ranks, strict=True))
    used = [number for number, (_, row) in enumerate(rows) if np.ptp(row)]
    taus = [kendall_tau(rows[number][0], np.negative(rows[number][1])) for number in used]
    result = {"tau": None, "interval": None, "rankings": len(used)}
    if used:
        values = np.array([tau or 0.0 for tau in taus])
        result |= {"tau": float(values.mean()), "interval": mean_interval(values, codes[used], seed)}
    return result | {"tied_scores": taus.count(None), "tied_ranks": len(scores) - len(used)}


RankingTau = metric(
    "RankingTau",
    ranking_tau,
    """Kendall's tau-b between scores and human ranks, as a mean over rankings.

    `predictions` are lists of scores, one for each ranking. `references` are lists of ranks, lower being better. Options as in
    `ranking_tau`.

        >>> RankingTau().compute(predictions=[[3.0, 2.0, 1.0], [0.0, 1.0]], references=[[1, 2, 3], [1, 2]])["tau"]
        0.0
    """,
    predictions=NUMBERS,
    references=NUMBERS,
)


def score_length(scores: ArrayLike, lengths: ArrayLike, *, groups: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """Return the correlation of scores with lengths in tokens, (N,) each.

    Prompts differ in how long an answer they need and in how well they are answered, which alone makes a correlation
    (Singhal et al. 2023). The one within prompts is free of it: it correlates deviations from the prompt's mean (Pearson),
    or deviations of the ranks among the prompt's answers (Spearman).

    Returns:
        `pearson`, `spearman`, `n`; `pearson_within`, `spearman_within`, `n_within`: of the answers that share a group. None
        where scores or lengths do not vary.

    Raises:
        ValueError: No answers, different lengths, or numbers that are not finite.
    """
    scores, lengths = columns_of(scores=scores, lengths=lengths)
    codes = codes_of(groups, len(scores))
    by_group = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    members = [rows for rows in by_group if len(rows) > 1]
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
    """Return the distribution of (N,) scores.

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


def preferred(chosen: Floats, rejected: Floats) -> Floats:
    """Return (N,) 1 where the first number is higher, 0.5 where they tie, else 0."""
    return (np.sign(chosen - rejected) + 1) / 2


def share_of_group(values: Floats, codes: Integers, seed: int) -> dict[str, Any]:
    """Return `n`, `accuracy` and its 95% `interval` of outcomes in [0, 1]."""
    if not len(values):
        return {"n": 0, "accuracy": None, "interval": None}
    return {"n": len(values), "accuracy": float(values.mean()), "interval": share_interval(values, codes, seed)}


def bin_of(values: Floats, inner: Floats) -> Integers:
    """Return (N,) bins from 0; a value on an edge belongs to the bin below."""
    return np.searchsorted(inner, values, side="left")


def _ranks(values: Floats) -> Floats:
    """Return (N,) ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def _centred(values: Floats) -> Floats:
    """Return (N,) deviations from the mean, exactly 0 for constants."""
    shifted = values - values[:1]
    return shifted - shifted.mean() if len(values) else shifted


def _pearson(first: Floats, second: Floats) -> float | None:
    first, second = _centred(first), _centred(second)
    norms = math.sqrt((first @ first) * (second @ second))
    return float(np.clip(first @ second / norms, -1, 1)) if norms else None
