"""Two policies compared: win rates, best-of-n, and KL.

`N` is the number of answers or comparisons. Those of one prompt are not independent: `groups`, (N,), names the prompt of each
(None: each has its own), and intervals (95%) resample whole prompts.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

from rlhf_recipes.evaluation.metrics.base import NUMBER, NUMBERS, metric
from rlhf_recipes.evaluation.metrics.intervals import (
    Floats,
    bootstrap,
    codes_of,
    columns_of,
    group_sums,
    mean_interval,
    wilson_interval,
)

import numpy as np
from numpy.typing import ArrayLike


def win_rate(
    scores: ArrayLike, others: ArrayLike, *, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return `share_won` of comparisons in which the higher of two (N,) scores wins.

    Raises:
        ValueError: Nothing to compare, different lengths, or numbers that are not finite.
    """
    scores, others = columns_of(scores=scores, others=others)
    return share_won((np.sign(scores - others) + 1) / 2, groups=groups, seed=seed)


def share_won(credits: ArrayLike, *, groups: Sequence[Hashable] | None = None, seed: int = 0) -> dict[str, Any]:
    """Return the win rate over comparisons that a judge has decided.

    `credits` are 1 for a win, 0 for a loss, 0.5 for a tie, or a mean of several verdicts.

    Returns:
        `win_rate`; `interval`: a bootstrap of whole prompts, or Wilson's with prompts as observations where all prompts have
        one win rate; `n`, `prompts`, `ties`.

    Raises:
        ValueError: Nothing to count, different lengths, or a credit outside [0, 1].
    """
    (credits,) = columns_of(credits=credits)
    if credits.min() < 0 or credits.max() > 1:
        raise ValueError(f"`credits` must be in [0, 1], but range from {credits.min()} to {credits.max()}.")
    sums, counts = group_sums(credits, codes_of(groups, len(credits)))
    mean = float(credits.mean())
    interval = bootstrap(sums, counts, seed) if np.ptp(sums / counts) else wilson_interval(mean, len(sums))
    ties = int((credits == 0.5).sum())
    return {"win_rate": mean, "interval": interval, "n": len(credits), "prompts": len(sums), "ties": ties}


WinRate = metric(
    "WinRate",
    win_rate,
    """The share of comparisons that the first policy wins, ties one half, with a 95% interval.

    `predictions` are the scores of its answers, `references` those of the other policy's. Options as in `win_rate`.

        >>> WinRate().compute(predictions=[2.0, 0.5, 0.0, 1.0], references=[1.0, 0.5, 1.0, 0.0])["win_rate"]
        0.625
    """,
    predictions=NUMBER,
    references=NUMBER,
)


def best_of_n(scores: ArrayLike, n: int, values: ArrayLike | None = None) -> Floats:
    """Return an unbiased estimate of the mean value of the best of n answers, (P,).

    Of N >= n answers, the one of rank i (1 is the lowest score) is the best of C(i - 1, n - 1) of the C(N, n) sets of n.
    Answers of equal score share their sets (Nakano et al., 2021, appendix I).

    Args:
        scores: (P, N) scores that the best is chosen by, of N answers to each of P prompts.
        n: Number of answers to choose from.
        values: (P, N) value of each answer if chosen, for instance its score under another reward. None: `scores`.

    Raises:
        ValueError: n outside 1 to N, different shapes, or numbers that are not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    values = scores if values is None else np.asarray(values, dtype=np.float64)
    if scores.ndim != 2 or scores.shape != values.shape or not scores.size:
        raise ValueError(f"Scores and values must have one shape (prompts, answers), not {scores.shape} and {values.shape}.")
    total = scores.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"`n` must be 1 to {total}, the number of answers to a prompt, not {n}.")
    if not (np.isfinite(scores).all() and np.isfinite(values).all()):
        raise ValueError("Scores and values must be finite.")
    weights = np.array([math.comb(rank, n - 1) / math.comb(total, n) for rank in range(total)])
    below = (scores[:, :, None] > scores[:, None, :]).sum(2)  # (P, N)
    tied = (scores[:, :, None] == scores[:, None, :]).sum(2)
    sums = np.concatenate([[0.0], weights.cumsum()])
    return ((sums[below + tied] - sums[below]) / tied * values).sum(1)


def best_of_n_kl(n: int) -> float:
    """Return the KL of the best of n from its policy, log n - (n - 1) / n nats.

    Exact where no two answers tie. In language they may, and it is an upper bound (Beirami et al., 2024, "Theoretical
    guarantees on the best-of-n alignment policy").
    """
    return math.log(n) - (n - 1) / n


def _best_of_n(predictions: list[list[float]], n: int, seed: int = 0) -> dict[str, Any]:
    best = best_of_n(predictions, n)
    interval = mean_interval(best, np.arange(len(best)), seed)
    return {"score": float(best.mean()), "interval": interval, "kl_bound": best_of_n_kl(n)}


BestOfN = metric(
    "BestOfN",
    _best_of_n,
    """The expected score of the best of n answers, with a 95% interval over prompts, and its KL bound in nats.

    `predictions` are lists of scores, those of the N answers to each prompt. N is the same for all, and at least n.

        >>> BestOfN().compute(predictions=[[0.0, 3.0, 6.0]], n=2)["score"]
        5.0
    """,
    predictions=NUMBERS,
)


def divergence(
    logps: ArrayLike, ref_logps: ArrayLike, *, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Estimate KL(policy || reference) and the policy's entropy from its answers.

    From (N,) log-probabilities of whole answers under the policy that sampled them, and under the reference, in nats. KL is
    the mean of log p - log p_ref, entropy the mean of -log p. Both are unbiased. In a small sample KL may be negative.

    Returns:
        `kl` and `entropy` in nats per answer, and their intervals, `kl_interval` and `entropy_interval` (None where all
        prompts agree).

    Raises:
        ValueError: No answers, different lengths, or numbers that are not finite.
    """
    logps, ref_logps = columns_of(logps=logps, ref_logps=ref_logps)
    codes = codes_of(groups, len(logps))
    result = {}
    for name, values in (("kl", logps - ref_logps), ("entropy", -logps)):
        result |= {name: float(values.mean()), f"{name}_interval": mean_interval(values, codes, seed)}
    return result


Divergence = metric(
    "Divergence",
    divergence,
    """KL from a reference policy and entropy, in nats per answer, by Monte Carlo on the policy's answers.

    `predictions` are log-probabilities of the answers under the policy, `references` those under the reference. Options as in
    `divergence`.

        >>> Divergence().compute(predictions=[-1.0, -2.0], references=[-2.0, -2.5])["kl"]
        0.75
    """,
    predictions=NUMBER,
    references=NUMBER,
)
