"""Healthy ranges of logged figures, and checks that stop a run."""

import logging
import math
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.generation.eos import NO_EOS
from rlhf_recipes.training.ppo.maths import Moments

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HealthyRange:
    """Healthy range of a logged figure.

    It is checked `after` so many optimizer steps, and left before a warning by `patience` logged values in a row.
    """

    metric: str
    low: float
    high: float
    advice: str
    after: int = 0
    patience: int = 3


RANGES = (
    HealthyRange("kl", -0.5, 50.0, "nats a completion: raise `kl_coef`, or set `kl_target`"),
    HealthyRange("entropy", 0.01, math.inf, "nats a token, one answer to all: raise `kl_coef` or `entropy_coef`"),
    HealthyRange("score_std", 1e-6, math.inf, "all scores are equal: check the rewards, and what the SFT model samples"),
    HealthyRange("completions/ended_ratio", 0.5, 1.0, f"few completions end with EOS: {NO_EOS}", patience=1),
    HealthyRange("approx_kl", 0.0, 0.1, "nats a token: lower `learning_rate` or `num_iterations`, or set `target_kl`"),
    HealthyRange("clip_ratio/region_mean", 0.0, 0.3, "steps are too large: lower `learning_rate` or `num_iterations`"),
    HealthyRange("value/explained_variance", -0.5, 1.0, "raise `value_learning_rate` or `value_warmup_steps`", after=20),
    HealthyRange("value/clip_ratio", 0.0, 0.5, "the critic cannot follow: raise `cliprange_value`, or null", after=20),
    HealthyRange("grad_norm", 0.0, 100.0, "of the policy: lower `learning_rate`, or look for scores of unusual size"),
)


class DiagnosticsCallback(TrainerCallback):
    """Warnings of unhealthy figures."""

    def __init__(self) -> None:
        self._outside, self._logged = dict.fromkeys(RANGES, 0), dict.fromkeys(RANGES, 0)
        self._newest = dict.fromkeys(RANGES, math.nan)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Warn after unhealthy values in a row, of which one alone is noise."""
        for entry in RANGES:
            value = logs.get(entry.metric)
            if value is None or state.global_step <= entry.after or not state.is_world_process_zero:
                continue
            healthy = math.isnan(value) or entry.low <= value <= entry.high  # NaN: it could not be measured
            self._outside[entry] = 0 if healthy else self._outside[entry] + 1
            self._logged[entry] += 1
            self._newest[entry] = value
            if self._outside[entry] == entry.patience:
                self._warn(entry, state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Warn of a short run's figures that were never healthy."""
        for entry, outside in self._outside.items():
            if 0 < outside == self._logged[entry] < entry.patience:
                self._warn(entry, state)

    def _warn(self, entry: HealthyRange, state: TrainerState) -> None:
        value = self._newest[entry]
        limit = f"below {entry.low:g}" if value < entry.low else f"above {entry.high:g}"
        logger.warning(
            "step %d: %s is %.3g, %s: %s. See docs/ppo.md, A healthy run",
            *(state.global_step, entry.metric, value, limit, entry.advice),
        )


# --- Checks that stop a run ------------------------------------------------------------------------------


def check_rewards(rewards: Tensor, names: list[str], are_models: list[bool], prompts: dict[int, Any]) -> None:
    """Refuse rewards (N, functions) that are infinite, or NaN from a model.

    A function's NaN means that it does not apply to the completion. `prompts` are those of this process, by row.
    """
    wrong = (rewards.isinf() | (rewards.isnan() & torch.tensor(are_models, device=rewards.device))).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise RecipeError(
            f"the reward {names[column]} returned {rewards[row, column].item()} for completion {row} of the batch, prompt "
            f"{prompts.get(row)!r:.300}. Fix: return finite numbers"
        )


def warn_of_unscored(unscored: Tensor) -> None:
    """Warn of a first rollout in which no completion is scored; `unscored` is (N,)."""
    if unscored.all():
        logger.warning(
            "step 0: every reward returned None for all %d completions: nothing is learnt from them. Fix: correct the rewards, "
            "or the columns that they read",
            len(unscored),
        )


def check_fused_head(model: nn.Module, ids: Tensor, temperature: float, exact: bool) -> None:
    """Refuse a model whose LM head TRL's fused head does not stand for.

    ModernBERT's decoder is one. `ids` are (1, T) of a rollout; `exact` is for fp32.
    """
    logps = (model(input_ids=ids, use_cache=False).logits[:, :-1].float() / temperature).log_softmax(-1)
    fused = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    gap = (logps.gather(2, ids[:, 1:, None])[..., 0] - fused).abs().mean().item()
    if not gap <= rounding_tolerance(ids.size(1), exact):
        raise RecipeError(
            f"step 0: model_name_or_path: TRL computes other log-probabilities than the model, by {gap:.3g} nats a token: "
            "its LM head is more than one linear layer. Fix: use another base model"
        )


def check_reference(gap: Moments, exact: bool) -> None:
    """Refuse to start where policy and reference differ.

    `gap` is of a token's absolute log-ratio; `exact` is for fp32.
    """
    if not gap.mean <= rounding_tolerance(gap.count, exact):
        raise RecipeError(
            f"step 0: policy and reference differ by {gap.mean:.3g} nats a token before training. Fix: start both from the "
            "same adapter, in one number type, without dropout"
        )


def check_ratio(gap: float, tokens: float, step: int, exact: bool) -> None:
    """Stop where the ratio of PPO is not 1 before the first step on a rollout.

    `gap` is the mean absolute log-ratio over `tokens`, in nats; `exact` is for fp32.
    """
    if not gap <= rounding_tolerance(tokens, exact):
        raise RecipeError(
            f"step {step}: the ratio of PPO is not 1: the policy differs by {gap:.3g} nats a token from the one that sampled, "
            "before its first step on these completions. Fix: find what differs between rollout and update: dropout, the "
            "active adapter, temperature, padding or the number type of the weights"
        )


def rounding_tolerance(tokens: float, exact: bool) -> float:
    """Return the nats a token that rounding may account for; more for few tokens."""
    return 1e-3 if exact else 0.05 + 0.2 / max(tokens, 1) ** 0.5
