"""Means over prompts, their intervals, and whether a difference may be chance."""

from dataclasses import replace

from rlhf_recipes.evaluation.metrics.comparison import best_of_n_kl, divergence, win_rate
from rlhf_recipes.evaluation.metrics.intervals import Floats, mean_interval, wilson_interval
from rlhf_recipes.evaluation.metrics.length_control import length_controlled
from rlhf_recipes.evaluation.types import UNSET, Estimate, WinRate

import numpy as np

MIN_PROMPTS = 6


def estimate(values: Floats, baseline: Floats | None = None, *, share: bool = False, seed: int = 0) -> Estimate | None:
    """Return the mean over prompts of the mean over a prompt's answers, (P, K).

    NaN is left out, and so is a prompt that has nothing else; None if there is no value. `baseline`, (P, K') of another policy
    on the same prompts, adds `difference`. A `share` has an interval even where all prompts agree.
    """
    means = _prompt_means(values)
    present = ~np.isnan(means)
    if not present.any():
        return None
    difference = UNSET
    if baseline is not None:
        differences = means - _prompt_means(baseline)
        both = ~np.isnan(differences)
        difference = mean_estimate(differences[both], seed) if both.any() else None
    return mean_estimate(means[present], seed, share=share, difference=difference)


def mean_estimate(values: Floats, seed: int, share: bool = False, **fields: object) -> Estimate:
    """Return the mean of (P,) values, one for each prompt."""
    mean, interval = float(values.mean()), mean_interval(values, np.arange(len(values)), seed)
    if share and interval is None:
        interval = wilson_interval(mean, len(values))
    return Estimate(mean=mean, interval=interval, n=len(values), **fields)


def is_insignificant(difference: Estimate | None) -> bool:
    """Return whether a difference may be chance.

    It may if its interval holds 0, or if fewer than 6 prompts count. Where all prompts differ alike, resampling gives no
    interval. By the sign test 6 prompts agree by chance with probability 2 * 2**-6 = .03, and 5 with .06.
    """
    if difference is None or not difference.mean or difference.n < MIN_PROMPTS:
        return True
    return difference.interval is not None and difference.interval[0] <= 0 <= difference.interval[1]


def win_rate_of(
    scores: Floats, others: Floats, seed: int, judge: str | None = None, lengths: tuple[Floats, Floats] | None = None
) -> WinRate | None:
    """Compare every answer with every answer of the other policy to the same prompt.

    Scores are (P, K) and (P, K'), NaN where there is none. `judge` names the reward where it is the judge. `lengths`, of the
    same shapes, add the win rate at equal length.
    """

    def paired(mine: Floats, theirs: Floats) -> list[Floats]:
        return np.broadcast_arrays(mine[:, :, None], theirs[:, None, :])

    one, other = paired(scores, others)
    present = ~(np.isnan(one) | np.isnan(other))
    if not present.any():
        return None
    prompts = np.broadcast_to(np.arange(len(scores))[:, None, None], one.shape)[present].tolist()
    result = WinRate(judge=judge or UNSET, **win_rate(one[present], other[present], groups=prompts, seed=seed))
    if lengths is None:
        return result
    credits = (np.sign(one - other)[present] + 1) / 2
    return replace(result, equal_length=at_equal_length(credits, *(one[present] for one in paired(*lengths)), prompts, seed))


def at_equal_length(credits: Floats, lengths: Floats, others: Floats, prompts: list[int], seed: int) -> Estimate:
    """Return the win rate at equal length, from (N,) comparisons and lengths."""
    result = length_controlled(credits, lengths, others, groups=prompts, seed=seed)
    difference = Estimate(mean=result["win_rate"] - 0.5, interval=[end - 0.5 for end in result["interval"]], n=len({*prompts}))
    return Estimate(mean=result["win_rate"], interval=result["interval"], n=difference.n, difference=difference)


def kl_and_entropy(logps: Floats, ref_logps: Floats, seed: int) -> tuple[Estimate, Estimate]:
    """Estimate KL and entropy in nats per answer from (P, K) log-probabilities."""
    prompts, count = logps.shape
    groups = np.repeat(np.arange(prompts), count).tolist()
    result = divergence(logps.ravel(), ref_logps.ravel(), groups=groups, seed=seed)
    kl, entropy = (Estimate(mean=result[name], interval=result[f"{name}_interval"], n=prompts) for name in ("kl", "entropy"))
    return kl, entropy


def best_of_n_kl_bound(n: int) -> Estimate:
    """Return the upper bound of the KL of best-of-n, in nats per answer."""
    return Estimate(mean=best_of_n_kl(n), interval=None, bound=True)


def _prompt_means(values: Floats) -> Floats:
    """Return (P,) means over answers without NaN; NaN where a prompt has nothing else."""
    counts = (~np.isnan(values)).sum(1)
    return np.where(counts > 0, np.nansum(values, 1) / np.maximum(counts, 1), np.nan)
