"""The arithmetic of PPO for language models, free of models and processes.

B is the number of completions and T the tokens of the longest. `mask` is (B, T): 1 on the tokens that the policy wrote, 0 on
padding and on the replies of tools. Values where it is 0 never matter.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-8
"""Keeps a division by a standard deviation of 0 finite; the value of TRL's PPO."""


# --- Means and deviations --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Number, mean and sum of squared deviations; `+` combines two sets.

    In this form, and in float64, nothing is lost where the mean is large against the deviation (Chan et al., 1983, "Algorithms
    for computing the sample variance").
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Tensor, mask: Tensor | None = None) -> "Moments":
        """Return the moments of the values where the mask is 1."""
        chosen = (values if mask is None else values[mask.bool()]).detach().double()
        if not chosen.numel():
            return cls()
        mean = chosen.mean()
        return cls(float(chosen.numel()), mean.item(), (chosen - mean).square().sum().item())

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if not count:
            return Moments()
        gap = other.mean - self.mean
        mean = self.mean + gap * other.count / count
        return Moments(count, mean, self.squares + other.squares + gap**2 * self.count * other.count / count)

    @property
    def variance(self) -> float:
        """Unbiased variance; 0 for fewer than two values."""
        return self.squares / (self.count - 1) if self.count > 1 else 0.0

    @property
    def std(self) -> float:
        """Square root of the variance."""
        return self.variance**0.5


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum where the mask is 1, a scalar. NaN elsewhere does not matter."""
    return torch.where(mask.bool(), values, 0.0).sum()


def whiten(values: Tensor, mask: Tensor, moments: Moments, shift_mean: bool = True) -> Tensor:
    """Scale values to variance 1 and, with `shift_mean`, mean 0.

    Args:
        values: (B, T).
        mask: (B, T); the result is 0 where it is 0.
        moments: of the values of the whole batch over all processes, not of a micro-batch.
        shift_mean: whether to move the mean to 0; otherwise the values keep their mean, as in TRL's PPO.
    """
    whitened = (values - moments.mean) / (moments.variance + EPSILON) ** 0.5
    if not shift_mean:
        whitened = whitened + moments.mean
    return torch.where(mask.bool(), whitened, 0.0)


# --- Rewards ---------------------------------------------------------------------------------------------


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """Estimate KL(policy || reference) at each token, in nats, (B, T).

    Both estimators are unbiased. `k1`, the log-ratio, can be negative. `k3` = exp(-k1) - 1 + k1 cannot, and varies less where
    policy and reference are close (Schulman, 2020, "Approximating KL divergence").

    Args:
        logps: log-probabilities under the policy, (B, T).
        ref_logps: under the reference, (B, T).
        estimator: which of the two.
    """
    log_ratio = logps - ref_logps
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return token rewards, (B, T): the KL penalty, plus the score at the last.

    Source: Ziegler et al., 2019, equation 2.

    Args:
        scores: one for each completion, (B,).
        kl: of each token, (B, T).
        mask: (B, T). A row without a token gets no reward.
        kl_coef: price of a nat of KL.
    """
    rewards = torch.where(mask.bool(), -kl_coef * kl, 0.0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), positions, -1).amax(dim=1) if mask.shape[1] else positions.new_zeros(len(mask)) - 1
    rows = (last >= 0).nonzero().flatten()
    rewards[rows, last[rows]] += scores[rows].to(rewards.dtype)
    return rewards


@dataclass
class ScoreScaling:
    """Scaling of scores by the mean and deviation of all scores so far, and clipping.

    Parameters:
        scale: whether to divide by the running standard deviation.
        center: whether to subtract the running mean too; only with `scale`.
        clip: the largest absolute score, or None.
        moments: of all scores so far.
    """

    scale: bool = False
    center: bool = False
    clip: float | None = None
    moments: Moments = Moments()

    def __call__(self, scores: Tensor) -> Tensor:
        """Return scores (B,) in the new scale; undivided while all were equal."""
        if self.scale:
            scores = scores - self.moments.mean if self.center else scores
            scores = scores / (self.moments.std if self.moments.std > EPSILON else 1.0)
        return scores if self.clip is None else scores.clamp(-self.clip, self.clip)

    def update(self, moments: Moments) -> None:
        """Add the scores of a batch to the running moments."""
        self.moments = self.moments + moments


@dataclass
class KLController:
    """Coefficient of the KL penalty, fixed or adapted to a target KL.

    Source: Ziegler et al., 2019, section 2.2.

    Parameters:
        coefficient: the current value.
        target: KL of a completion in nats, or None for a fixed coefficient.
        horizon: completions over which an error of 20%, the largest that counts, changes the coefficient by about 20%.
    """

    coefficient: float
    target: float | None = None
    horizon: float = 10_000

    def update(self, kl: float, samples: int) -> None:
        """Raise or lower the coefficient.

        Args:
            kl: mean KL of a completion, summed over its tokens, in nats.
            samples: number of completions in the mean.
        """
        if self.target is None:
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= max(1 + error * samples / self.horizon, 0.0)


# --- Advantages ------------------------------------------------------------------------------------------


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates, and the returns that the critic learns.

    Source: Schulman et al., 2016, equation 16.

    The value after the last token is 0, whether it is EOS or the completion was cut off there: tokens that are never written
    earn nothing. Tokens that the policy did not write are skipped, as part of the environment.

    Args:
        rewards: of each token, (B, T).
        values: of the state in which each token was written, (B, T).
        mask: (B, T).
        gamma: discount of a token.
        lam: 1 trusts the rewards, 0 the critic.

    Returns:
        Advantages and returns, (B, T) each, 0 where the mask is 0; not whitened.
    """
    written = mask.bool()
    advantages = torch.zeros_like(rewards)
    following, next_value = rewards.new_zeros(len(rewards)), rewards.new_zeros(len(rewards))
    for step in reversed(range(rewards.shape[1])):
        here = written[:, step]
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        following = torch.where(here, delta + gamma * lam * following, following)
        next_value = torch.where(here, values[:, step], next_value)
        advantages[:, step] = torch.where(here, following, 0.0)
    return advantages, torch.where(written, advantages + values, 0.0)


# --- Losses and what tells whether they are healthy ------------------------------------------------------


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    """Return the clipped value loss.

    It is half the larger squared error of the value and of the value clipped to the old one.

    Args:
        values: of the critic now, (B, T).
        old_values: when the completions were sampled, (B, T).
        returns: (B, T).
        mask: (B, T).
        cliprange: how far a value may move from the old one before its gradient stops; None for no limit.

    Returns:
        The sum over tokens, which the caller divides by the tokens of all micro-batches; and the number of tokens where the
        clipped error was larger.
    """
    error = (values - returns).square()
    clipped = error
    if cliprange is not None:
        clipped = (old_values + (values - old_values).clamp(-cliprange, cliprange) - returns).square()
    loss = 0.5 * masked_sum(torch.maximum(error, clipped), mask)
    return loss, ((clipped > error) & mask.bool()).sum()


def approximate_kl(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """Return KL(old policy || policy), the sum of `k3` over tokens, in nats."""
    return masked_sum(kl_estimate(old_logps, logps, "k3"), mask)


def explained_variance(errors: Moments, returns: Moments) -> float:
    """Return the share of the variance of the returns that the values explain.

    It is 1 for a perfect critic, 0 for a constant, negative for a worse one, and NaN where all returns are equal.

    Args:
        errors: of returns less values.
        returns: of the returns.
    """
    return 1 - errors.squares / returns.squares if returns.squares else float("nan")
