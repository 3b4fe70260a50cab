"""What a healthy run of PPO looks like, and what to do when it does not; `docs/ppo.md` explains each figure."""

import logging
import math
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.training.ppo.maths import Moments

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

PATIENCE = 3
"""Logged values in a row outside the healthy range that make a warning: one alone is noise."""


@dataclass(frozen=True)
class HealthyRange:
    """The healthy range of a logged figure, and what is the matter outside it.

    Parameters:
        metric: the name in the log.
        low: the least healthy value.
        high: the largest.
        advice: what it means to be outside, and what to do.
        after: optimizer steps before which it is not looked at.
    """

    metric: str
    low: float
    high: float
    advice: str
    after: int = 0

    def holds(self, value: float) -> bool:
        """Whether a value is healthy; NaN, of something that could not be measured, is."""
        return math.isnan(value) or self.low <= value <= self.high


RANGES = (
    HealthyRange(
        "kl",
        -0.5,
        50.0,
        "nats of KL a completion. Far above: the policy leaves the reference behind, and the reward model is asked about text "
        "that it was not trained on: raise `kl_coef`, or set `kl_target`. Below 0: the two do not see the same tokens",
    ),
    HealthyRange(
        "entropy",
        0.01,
        math.inf,
        "nats a token: the policy says the same thing every time, and finds nothing new: raise `kl_coef` or `entropy_coef`, or "
        "lower `learning_rate`",
    ),
    HealthyRange(
        "score_std",
        1e-6,
        math.inf,
        "all completions have one score, so there is nothing to learn from: look at the reward functions, and at whether the "
        "SFT model ever samples what they reward",
    ),
    HealthyRange(
        "completions/ended_ratio",
        0.5,
        1.0,
        "the share of completions that end by EOS: most are cut off, and scored as if they were whole: raise "
        "`max_completion_length`, set `missing_eos_penalty`, or look whether EOS was taught in SFT",
    ),
    HealthyRange(
        "approx_kl",
        0.0,
        0.1,
        "nats a token between the policy and the one that sampled: an iteration moves it too far: lower `learning_rate` or "
        "`num_iterations`, or set `target_kl`",
    ),
    HealthyRange(
        "clip_ratio/region_mean",
        0.0,
        0.3,
        "the share of tokens where the ratio is clipped: steps are too large: lower `learning_rate` or `num_iterations`",
    ),
    HealthyRange(
        "value/explained_variance",
        -0.5,
        1.0,
        "the critic is worse than a constant: raise `value_learning_rate` or `value_warmup_steps`",
        after=20,
    ),
    HealthyRange(
        "value/clip_ratio",
        0.0,
        0.5,
        "values are clipped at most tokens, so the critic cannot follow: raise `cliprange_value`, or set it to null",
        after=20,
    ),
    HealthyRange(
        "grad_norm", 0.0, 100.0, "of the policy, before it is clipped: lower `learning_rate`, or look for scores of odd size"
    ),
)


class DiagnosticsCallback(TrainerCallback):
    """Warns when a figure has left its healthy range, once each time that it leaves; stops a run that changed nothing."""

    def __init__(self) -> None:
        self._outside = dict.fromkeys((entry.metric for entry in RANGES), 0)
        self._before: dict[str, float] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Looks at what was logged."""
        for entry in RANGES:
            value = (logs or {}).get(entry.metric)
            if value is None or state.global_step <= entry.after or not state.is_world_process_zero:
                continue
            self._outside[entry.metric] = 0 if entry.holds(value) else self._outside[entry.metric] + 1
            if self._outside[entry.metric] == PATIENCE:
                logger.warning("step %d: %s is %.3g: %s", state.global_step, entry.metric, value, entry.advice)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Remembers the policy."""
        self._before, self._first_step = _digests(model), state.global_step

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Looks whether the policy has changed.

        Raises:
            RecipeError: if not one of its weights has, after steps in which they should.
        """
        learnt = state.global_step - max(self._first_step, args.value_warmup_steps)
        enough = 1
        if args.target_kl is not None:  # a resumed run may have begun in an iteration whose rest is left out
            enough = math.ceil(args.num_iterations * args.steps_per_generation / args.gradient_accumulation_steps)
        if learnt >= enough and _digests(model) == self._before:
            raise RecipeError(
                f"{learnt} steps have not changed the policy by one bit: a learning rate of {args.learning_rate:g}, scores "
                "that are all alike, or an adapter that is not in use"
            )


# --- Checks that stop a run ------------------------------------------------------------------------------


def check_rewards(rewards: Tensor, names: list[str], are_models: list[bool], prompts: dict[int, Any]) -> None:
    """Refuse rewards that are infinite, or NaN from a model. A function's NaN means that it does not apply.

    Args:
        rewards: (N, functions).
        names: of the functions.
        are_models: whether each function is a model.
        prompts: those of this process, by their row of the N.
    """
    wrong = (rewards.isinf() | (rewards.isnan() & torch.tensor(are_models, device=rewards.device))).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise RecipeError(
            f"the reward {names[column]} returned {rewards[row, column].item()} for completion {row} of the batch, prompt "
            f"{prompts.get(row)!r:.300}. Fix: return finite numbers"
        )


def check_reference(gap: Moments, exact: bool) -> None:
    """Refuse to start where policy and reference differ: a role is not what it should be.

    Args:
        gap: moments of the absolute log-ratio of a token.
        exact: whether both were computed in fp32.
    """
    if not gap.mean <= rounding_tolerance(gap.count, exact):
        raise RecipeError(
            f"step 0: policy and reference differ by {gap.mean:.3g} nats a token before training. Fix: start both from the "
            "same adapter, in one number type, without dropout"
        )


def check_ratio(gap: float, tokens: float, step: int, exact: bool) -> None:
    """Stop where the ratio of PPO is not 1 before the first step on a rollout.

    Args:
        gap: mean absolute log-ratio of a token between the policy and the one that sampled, in nats.
        tokens: number of tokens in the mean.
        step: for the message.
        exact: whether both were computed in fp32.
    """
    if not gap <= rounding_tolerance(tokens, exact):
        raise RecipeError(
            f"step {step}: the ratio of PPO is not 1: the policy differs by {gap:.3g} nats a token from the one that sampled, "
            "before its first step on these completions. Fix: find what differs between rollout and update: dropout, the "
            "active adapter, temperature, padding or the number type of the weights"
        )


def rounding_tolerance(tokens: float, exact: bool) -> float:
    """Return by how many nats a token two passes may differ through rounding: in bf16 by more where tokens are few."""
    return 1e-3 if exact else 0.05 + 0.2 / max(tokens, 1) ** 0.5


@torch.no_grad()
def _digests(model: nn.Module) -> dict[str, float]:
    """A number for each weight that is trained, which changes when the weight does."""
    return {
        name: weight.double().abs().sum().item() + weight.double().sum().item() / 3
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
