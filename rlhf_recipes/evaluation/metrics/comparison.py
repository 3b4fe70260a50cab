"""Two policies against each other: who wins, what best-of-n would gain, how far one has moved from the other.

Pure functions of plain lists and arrays, and an `evaluate.Metric` around each. `N` is the number of answers or comparisons.
Those of one prompt are not independent: `groups` names the prompt of each, and intervals are then of whole prompts, resampled.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

from rlhf_recipes.evaluation.metrics.intervals import (
    Floats,
    bootstrap,
    codes_of,
    columns_of,
    group_sums,
    mean_interval,
    metric_info,
    wilson_interval,
)

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike

_NUMBER = datasets.Value("float64")


# --- Win rate --------------------------------------------------------------------------------------------


def win_rate(
    scores: ArrayLike, others: ArrayLike, *, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> dict[str, Any]:
    """The share of comparisons in which the first answer has the higher score; a tie counts one half.

    Args:
        scores: (N,) scores of the answers of one policy.
        others: (N,) scores of another policy's answers to the same prompts.
        groups: (N,) the prompt of each comparison; None: one comparison a prompt.
        seed: of the resampling.

    Returns:
        As `share_won`.

    Raises:
        ValueError: nothing to compare, lists of different lengths, or numbers that are not finite.
    """
    scores, others = columns_of(scores=scores, others=others)
    return share_won((np.sign(scores - others) + 1) / 2, groups=groups, seed=seed)


def share_won(credits: ArrayLike, *, groups: Sequence[Hashable] | None = None, seed: int = 0) -> dict[str, Any]:
    """The win rate of comparisons that a judge has decided.

    Args:
        credits: (N,) 1 for a win, 0 for a loss, 0.5 for a tie; something between where several verdicts were averaged.
        groups: (N,) the prompt of each comparison; None: one comparison a prompt.
        seed: of the resampling.

    Returns:
        `win_rate`; `interval` (95%): a bootstrap of whole prompts or, where all prompts have one win rate, so that resampling
        says nothing, Wilson's with prompts as observations; `n`, `prompts`, `ties`.

    Raises:
        ValueError: nothing to count, lists of different lengths, or a credit out of [0, 1].
    """
    (credits,) = columns_of(credits=credits)
    if credits.min() < 0 or credits.max() > 1:
        raise ValueError(f"`credits` must be in [0, 1], and range from {credits.min()} to {credits.max()}.")
    sums, counts = group_sums(credits, codes_of(groups, len(credits)))
    mean = float(credits.mean())
    interval = bootstrap(sums, counts, seed) if np.ptp(sums / counts) else wilson_interval(mean, len(sums))
    ties = int((credits == 0.5).sum())
    return {"win_rate": mean, "interval": interval, "n": len(credits), "prompts": len(sums), "ties": ties}


class WinRate(evaluate.Metric):
    """The share of comparisons that the first policy wins, ties one half, with a 95% interval.

    `predictions` are the scores of its answers, `references` those of the other policy's; options as in `win_rate`.

        >>> WinRate().compute(predictions=[2.0, 0.5, 0.0, 1.0], references=[1.0, 0.5, 1.0, 0.0])["win_rate"]
        0.625
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self, _NUMBER)

    def _compute(self, predictions: list[float], references: list[float], **options: Any) -> dict[str, Any]:
        return win_rate(predictions, references, **options)


# --- Best of n -------------------------------------------------------------------------------------------


def best_of_n(scores: ArrayLike, n: int, values: ArrayLike | None = None) -> Floats:
    """The expected value of the best of n answers, estimated without bias from N >= n of them.

    The answer of rank i (1 is the lowest score) is the best of C(i - 1, n - 1) of the C(N, n) sets of n; answers of equal score
    share what they have together. (Nakano et al., 2021, appendix I.)

    Args:
        scores: (P, N) the scores that the best is chosen by, of N answers to each of P prompts.
        n: how many are chosen from.
        values: (P, N) what is wanted of the chosen answer, for instance its score under another reward; None: `scores`.

    Returns:
        (P,) the expectation for each prompt.

    Raises:
        ValueError: n out of 1 to N, other shapes, or numbers that are not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    values = scores if values is None else np.asarray(values, dtype=np.float64)
    if scores.ndim != 2 or scores.shape != values.shape or not scores.size:
        raise ValueError(f"Scores and values of one shape (prompts, answers) are needed: {scores.shape} and {values.shape}.")
    total = scores.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"`n` must be 1 to {total}, the number of answers to a prompt, and is {n}.")
    if not (np.isfinite(scores).all() and np.isfinite(values).all()):
        raise ValueError("Scores and values must be finite.")
    weights = np.array([math.comb(rank, n - 1) / math.comb(total, n) for rank in range(total)])
    below = (scores[:, :, None] > scores[:, None, :]).sum(2)  # (P, N), as is what follows
    alike = (scores[:, :, None] == scores[:, None, :]).sum(2)
    sums = np.concatenate([[0.0], weights.cumsum()])
    return ((sums[below + alike] - sums[below]) / alike * values).sum(1)


def best_of_n_kl(n: int) -> float:
    """KL of the best of n from the policy that the n are drawn from, in nats: log n - (n - 1) / n.

    Exact where no two answers have the same score and probability mass; where they may, as in language, the most that it can be
    (Beirami et al., 2024, "Theoretical guarantees on the best-of-n alignment policy").

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"`n` must be 1 or more, and is {n}.")
    return math.log(n) - (n - 1) / n


class BestOfN(evaluate.Metric):
    """The expected score of the best of n answers, with a 95% interval over prompts, and its KL bound in nats.

    `predictions` are lists of scores, those of N answers to each prompt, N the same for all and at least n.

        >>> BestOfN().compute(predictions=[[0.0, 3.0, 6.0]], n=2)["score"]
        5.0
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.List(_NUMBER)})
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=features)

    def _compute(self, predictions: list[list[float]], n: int, seed: int = 0) -> dict[str, Any]:
        best = best_of_n(predictions, n)
        interval = mean_interval(best, np.arange(len(best)), seed)
        return {"score": float(best.mean()), "interval": interval, "kl_bound": best_of_n_kl(n)}


# --- Divergence ------------------------------------------------------------------------------------------


def divergence(
    logps: ArrayLike, ref_logps: ArrayLike, *, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> dict[str, Any]:
    """KL(policy || reference) and the policy's entropy, estimated from answers that the policy itself has drawn.

    KL is the mean of log p - log p_ref, and entropy that of -log p: unbiased, and in a small sample KL may be negative.

    Args:
        logps: (N,) log-probabilities of whole answers under the policy that drew them, in nats.
        ref_logps: (N,) those under the reference.
        groups: (N,) the prompt of each; None: one answer a prompt.
        seed: of the resampling.

    Returns:
        `kl` and `entropy` in nats an answer, and their 95% intervals, `kl_interval` and `entropy_interval` (None where all
        prompts agree).

    Raises:
        ValueError: no answers, lists of different lengths, or numbers that are not finite.
    """
    logps, ref_logps = columns_of(logps=logps, ref_logps=ref_logps)
    codes = codes_of(groups, len(logps))
    result = {}
    for name, values in (("kl", logps - ref_logps), ("entropy", -logps)):
        result |= {name: float(values.mean()), f"{name}_interval": mean_interval(values, codes, seed)}
    return result


class Divergence(evaluate.Metric):
    """KL from a reference policy and entropy, in nats an answer, by Monte Carlo on the policy's own answers.

    `predictions` are log-probabilities of the answers under the policy, `references` those under the reference; options as in
    `divergence`.

        >>> Divergence().compute(predictions=[-1.0, -2.0], references=[-2.0, -2.5])["kl"]
        0.75
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self, _NUMBER)

    def _compute(self, predictions: list[float], references: list[float], **options: Any) -> dict[str, Any]:
        return divergence(predictions, references, **options)
