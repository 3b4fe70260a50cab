"""The rollout of an iteration: completions, and what the update learns from."""

from dataclasses import dataclass, field, fields
from typing import Any, Self

from rlhf_recipes.training.ppo.maths import Moments, explained_variance

import torch
from accelerate.utils import gather_object
from torch import Tensor

TRL_NAMES = {
    "loss_mask": "tool_mask",  # TRL's loss takes the tokens of `completion_mask * tool_mask`
    "num_items": "num_items_in_batch",
    "old_logps": "old_per_token_logps",
    "vllm_logps": "sampling_per_token_logps",
}
"""TRL's keys for fields of `Rollout`; the others have one name in both."""


@dataclass(frozen=True)
class TokenBatch:
    """Prompts and their completions as token ids.

    B is the number of completions, P the tokens of the longest prompt, T those of the longest completion.

    Attributes:
        prompt_ids: (B, P), padded on the left.
        prompt_mask: (B, P), 1 on tokens and 0 on padding.
        completion_ids: (B, T), padded on the right.
        completion_mask: (B, T), 1 on tokens and 0 on padding.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor

    @classmethod
    def from_trl(cls, batch: dict[str, Any]) -> Self:
        """Read the fields from TRL's dictionary of tensors."""
        return cls(**{field.name: batch.get(TRL_NAMES.get(field.name, field.name)) for field in fields(cls)})

    def to_trl(self) -> dict[str, Tensor]:
        """Return the dictionary that TRL shuffles, splits and computes its loss from."""
        named = {TRL_NAMES.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def input_ids(self) -> Tensor:
        """Prompts with completions, (B, P + T)."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """Mask of `input_ids`, (B, P + T)."""
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)

    @property
    def length(self) -> int:
        """T, the number of tokens of the longest completion."""
        return self.completion_ids.size(1)


@dataclass(frozen=True)
class Rollout(TokenBatch):
    """A batch of completions, or a micro-batch, with all that the update needs.

    Attributes:
        loss_mask: (B, T), 1 on the tokens to learn from: those that the policy wrote, in a completion that some reward
            function scored.
        num_items: (), the number of tokens to learn from in the whole batch, over all processes.
        old_logps: (B, T), log-probabilities under the policy that sampled.
        ref_logps: (B, T), under the reference; equal to `old_logps` where there is none.
        old_values: (B, T), values of the critic at that time.
        scores: (B,), one for each completion, scaled.
        advantages: (B, T), whitened if asked for; 0 outside `loss_mask`.
        returns: (B, T), the targets of the critic; 0 outside `loss_mask`.
        vllm_logps: (B, T), what vLLM says of the tokens that it sampled, or None.
        importance_sampling_ratio: TRL's correction for the difference between vLLM and the policy, or None.
    """

    loss_mask: Tensor
    num_items: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    old_values: Tensor
    scores: Tensor
    advantages: Tensor
    returns: Tensor
    vllm_logps: Tensor | None = None
    importance_sampling_ratio: Tensor | None = None


@dataclass
class IterationProgress:
    """What is known of the updates on the current rollout.

    Attributes:
        updated: whether the policy has taken a step on it.
        stopped: whether `target_kl` was exceeded, so that the rest of the iteration is left out.
        drift: of each micro-batch since the last step, (3,): sums over tokens of the KL from the policy that sampled and of
            the absolute log-ratio, and the number of tokens.
    """

    updated: bool = False
    stopped: bool = False
    drift: list[Tensor] = field(default_factory=list)


def global_moments(values: Tensor, mask: Tensor | None = None) -> Moments:
    """Return the moments of the values of all processes, where the mask is 1."""
    return sum(gather_object([Moments.of(values, mask)]), Moments())


def rollout_metrics(rollout: Rollout, kl: Moments, kl_coef: float) -> dict[str, float]:
    """Return the logged figures of a rollout; `kl` is of a completion, in nats."""
    mask = rollout.loss_mask
    score = global_moments(rollout.scores, mask.any(dim=1))
    errors = global_moments(rollout.returns - rollout.old_values, mask)
    return {
        "kl": kl.mean,
        "kl_coef": kl_coef,
        "score": score.mean,
        "score_std": score.std,
        "rlhf_reward": score.mean - kl_coef * kl.mean,
        "value/mean": global_moments(rollout.old_values, mask).mean,
        "value/explained_variance": explained_variance(errors, global_moments(rollout.returns, mask)),
    }
