"""Agreement of scores with human preferences: accuracy and Kendall's tau.

Results are JSON-serialisable: an undefined number is None, never NaN. Comparisons of one prompt are not independent, so
intervals resample whole groups.
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
    """Return the share of comparisons whose chosen answer has the higher score.

    A tie counts one half.

    Args:
        chosen: (N,) scores of the chosen answers.
        rejected: (N,) scores of the rejected answers.
        groups: (N,) group of each comparison, for instance its prompt. None: comparisons are independent.
        chosen_lengths: (N,) lengths of the chosen answers. With `rejected_lengths` it adds `by_length`.
        rejected_lengths: (N,) lengths of the rejected answers.
        margins: (N,) how much better people found the chosen answer. Adds `by_human_margin`.
        seed: Of the resampling.

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
        quartile = bin_of(values, inner_quantiles(values, 4))
        slices = [quartile == number for number in np.unique(quartile)]
        return [{"low": float(values[rows].min()), "high": float(values[rows].max())} | share(rows) for rows in slices]

    result = share(slice(None)) | {"groups": int(codes.max()) + 1, "ties": int((chosen == rejected).sum())}
    result["by_predicted_margin"] = by_quartile(np.abs(chosen - rejected))
    if margins is not None:
        result["by_human_margin"] = by_quartile(columns_of(chosen=chosen, margins=margins)[1])
    if chosen_lengths is not None or rejected_lengths is not None:
        lengths = columns_of(chosen=chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
        longer = np.sign(lengths[1] - lengths[2])
        result["by_length"] = {
            name: share(longer == sign) for name, sign in (("chosen_longer", 1), ("chosen_shorter", -1), ("same_length", 0))
        }
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

    Every ranking counts the same, whatever its length. If its scores all tie it counts 0. If its ranks all tie it is left out.

    Args:
        scores: (K,) scores of each ranking. K may differ.
        ranks: (K,) human ranks of each ranking, lower being better.
        groups: Prompt of each ranking. None: rankings are independent.
        seed: Of the resampling.

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


def preferred(chosen: Floats, rejected: Floats) -> Floats:
    """Return (N,) 1 where the first number is higher, 0.5 where they tie, else 0."""
    return (np.sign(chosen - rejected) + 1) / 2


def share_of_group(values: Floats, codes: Integers, seed: int) -> dict[str, Any]:
    """Return `n`, `accuracy` and its 95% `interval` of outcomes in [0, 1]."""
    if not len(values):
        return {"n": 0, "accuracy": None, "interval": None}
    return {"n": len(values), "accuracy": float(values.mean()), "interval": share_interval(values, codes, seed)}


def inner_quantiles(values: Floats, parts: int) -> Floats:
    """Return the inner edges of at most `parts` bins of equal counts.

    Equal values share a bin, so there may be fewer bins.
    """
    return np.unique(np.quantile(values, np.arange(1, parts) / parts))


def bin_of(values: Floats, inner: Floats) -> Integers:
    """Return (N,) bins from 0, given the edges between them.

    A value on an edge belongs to the bin below.
    """
    return np.searchsorted(inner, values, side="left")
