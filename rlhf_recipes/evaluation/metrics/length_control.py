"""Win rates at equal length, since judges and reward models prefer long answers."""

from collections.abc import Hashable, Sequence
from typing import Any

from rlhf_recipes.evaluation.metrics.intervals import RESAMPLES, Floats, codes_of, columns_of, group_sums, wilson_interval

import numpy as np
from numpy.typing import ArrayLike

_PROMPT_PRECISION = 1.0  # of the normal prior of a prompt's term, in logits
_PRECISION = 1e-4  # of those of the other terms: they stay finite where one policy wins every comparison
_STEPS, _STEPS_AGAIN = 30, 6  # of Newton's method, from 0 and from the fit to all prompts
_LONGEST_STEP = 2.0  # in logits
_AT_ONCE = 200_000  # comparisons times resamples


def length_controlled(
    credits: ArrayLike,
    lengths: ArrayLike,
    others: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the win rate if the answers of both policies were equally long.

    A logistic model explains who wins comparison i of prompt x:

        P(win) = sigmoid(theta + phi tanh(d_i / std(d)) + psi_x)

    where d is the difference of lengths, and a tie is half a win. The win rate is its mean with phi = 0 (Dubois et al., 2024,
    arXiv:2404.04475; of one pair of policies the prompt's term is a number with a standard normal prior).

    Args:
        credits: (N,) 1 for a win, 0 for a loss, 0.5 for a tie, or a mean of several verdicts.
        lengths: (N,) of the first policy's answers, in any unit.
        others: (N,) of the other policy's.
        groups: (N,) the prompt of each comparison; None: each has its own.
        seed: of the bootstrap of whole prompts.

    Returns:
        `win_rate`, `interval` (95%; Wilson's where all prompts have one win rate), and `phi`: above 0 the longer answer wins
        more often.

    Raises:
        ValueError: nothing to count, different shapes, numbers that are not finite, or a credit outside [0, 1].
    """
    credits, lengths, others = columns_of(credits=credits, lengths=lengths, others=others)
    if credits.min() < 0 or credits.max() > 1:
        raise ValueError(f"`credits` must be in [0, 1], but range from {credits.min()} to {credits.max()}.")
    codes = codes_of(groups, len(credits))
    order = np.argsort(codes, kind="stable")
    starts = np.unique(codes[order], return_index=True)[1]
    differences = (lengths - others)[order]
    spread = differences.std() or 1.0
    model = _Model(credits[order], np.tanh(differences / spread), starts)
    common, prompts = model.fit(np.ones((1, len(starts))), np.zeros((1, 2)), np.zeros((1, len(starts))), _STEPS)
    generator, resampled = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, size := max(1, _AT_ONCE // len(credits))):
        weights = generator.multinomial(len(starts), np.full(len(starts), 1 / len(starts)), size=size).astype(float)
        again = model.fit(weights, np.repeat(common, size, 0), np.repeat(prompts, size, 0), _STEPS_AGAIN)
        resampled.append(model.equal_length(weights, *again))
    interval = np.quantile(np.concatenate(resampled)[:RESAMPLES], (0.025, 0.975)).tolist()
    rate = float(model.equal_length(np.ones((1, len(starts))), common, prompts)[0])
    sums, counts = group_sums(credits, codes)
    if np.ptp(sums / counts) == 0:  # resampling gives no interval
        interval = wilson_interval(rate, len(starts))
    return {"win_rate": rate, "interval": interval, "phi": float(common[0, 1])}


class _Model:
    """The logistic model, fitted to B weightings of the prompts (G) at once.

    Comparisons are sorted by prompt. `common`, (B, 2), holds theta and phi, `prompts`, (B, G), the terms of prompts.
    """

    def __init__(self, credits: Floats, differences: Floats, starts: np.ndarray) -> None:
        self.credits, self.differences, self.starts = credits, differences, starts
        self.counts = np.diff(np.append(starts, len(credits)))

    def fit(self, weights: Floats, common: Floats, prompts: Floats, steps: int) -> tuple[Floats, Floats]:
        """Maximise the penalised likelihood by Newton's method.

        The terms of prompts are independent of each other given the common ones, so that they are eliminated from each step.
        """
        for _ in range(steps):
            chances = self._chances(common, prompts)
            residuals, variances = self.credits - chances, chances * (1 - chances)
            gradient = self._sums(residuals) - _PROMPT_PRECISION * prompts
            curvature = self._sums(variances) + _PROMPT_PRECISION
            mixed = np.stack([self._sums(variances), self._sums(variances * self.differences)], -1)  # (B, G, 2)
            slope = np.stack([self._sums(residuals), self._sums(residuals * self.differences)], -1)
            both = mixed[..., None] * mixed[..., None, :] / curvature[..., None, None]
            square = np.stack([mixed, np.stack([mixed[..., 1], self._sums(variances * self.differences**2)], -1)], -1)
            hessian = np.einsum("bg,bgij->bij", weights, square - both) + _PRECISION * np.eye(2)
            total = np.einsum("bg,bgi->bi", weights, slope - mixed * (gradient / curvature)[..., None]) - _PRECISION * common
            step = np.clip(np.linalg.solve(hessian, total[..., None])[..., 0], -_LONGEST_STEP, _LONGEST_STEP)
            prompts = prompts + (gradient - np.einsum("bgi,bi->bg", mixed, step)) / curvature
            common = common + step
        return common, prompts

    def equal_length(self, weights: Floats, common: Floats, prompts: Floats) -> Floats:
        """Return the win rates without the term of length, (B,)."""
        chances = self._chances(common * [1.0, 0.0], prompts)
        return (weights * self._sums(chances)).sum(1) / (weights * self.counts).sum(1)

    def _chances(self, common: Floats, prompts: Floats) -> Floats:
        logits = common[:, :1] + common[:, 1:] * self.differences + np.repeat(prompts, self.counts, axis=1)
        return 1 / (1 + np.exp(-logits))

    def _sums(self, values: Floats) -> Floats:
        return np.add.reduceat(values, self.starts, axis=-1)
