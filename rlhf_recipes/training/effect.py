"""Whether a training will change the model, and whether it has."""

import logging
from typing import Any

from rlhf_recipes.config.launcher import plain
from rlhf_recipes.config.ppo import check_value_warmup
from rlhf_recipes.core.errors import RecipeError

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_SHORTEST = 1e-6  # sum of all learning rates: Adam, and SGD with clipped gradients, move no weight much farther
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


class EffectCallback(TrainerCallback):
    """Errors and warnings about runs that learn nothing, or next to nothing."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Look at the schedule, and remember the weights.

        Raises:
            RecipeError: if the model could not change.
        """
        check_schedule(args, state.max_steps)
        self._before, self._first_step = _digests(model), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Log at the end of a run that is shorter than `logging_steps`."""
        logged = any("loss" in entry for entry in state.log_history)
        if state.global_step >= state.max_steps and not logged and plain(args.logging_strategy) != "no":
            control.should_log = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Fail if steps that should have changed the weights have not.

        Two runs are only warned of: one with a learning rate of 0 (but for PPO), and a resumed one, whose last steps may be
        too small for the weights' type.

        Raises:
            RecipeError: with what to look at.
        """
        steps = state.global_step - max(self._first_step, getattr(args, "value_warmup_steps", 0))
        if steps <= 0 or not self._before or _digests(model) != self._before:
            return
        message = (
            f"{steps} steps have not changed the model by one bit. Fix: check `learning_rate` ({args.learning_rate:g}), "
            "`lr_scheduler_type` and `warmup_steps`, whether scores or rows differ, and which adapter is active"
        )
        measures_a_loss = args.learning_rate == 0 and not hasattr(args, "value_warmup_steps")
        if not (self._first_step or measures_a_loss):
            raise RecipeError(message)
        logger.warning("%s", message)


def check_schedule(args: TrainingArguments, steps: int) -> None:
    """Refuse or warn of a run that is over before the model learns.

    Args:
        args: of the trainer.
        steps: optimizer steps of the whole run; 0 if they are not known.

    Raises:
        RecipeError: if no step would change the model.
    """
    if steps <= 0:
        return
    critic_alone = getattr(args, "value_warmup_steps", 0)
    check_value_warmup(critic_alone, steps)
    if steps - critic_alone < critic_alone:
        logger.warning(
            "value_warmup_steps: %d: only %d of %d steps train the policy. Fix: set it lower, or train longer",
            *(critic_alone, steps - critic_alone, steps),
        )
    if (distance := args.learning_rate * (steps - critic_alone)) < _SHORTEST:
        logger.warning(
            "learning_rate: %g: in %d steps no weight moves farther than about %.0e. Fix: raise it",
            *(args.learning_rate, steps - critic_alone, distance),
        )
    warmup = 0 if plain(args.lr_scheduler_type) in _WITHOUT_WARMUP else args.get_warmup_steps(steps)
    if warmup < steps:
        return
    if steps == 1:
        raise RecipeError("warmup_steps: the learning rate of the only step would be 0. Fix: set it to 0, or train longer")
    logger.warning(
        "warmup_steps: %d: in %d steps the learning rate reaches %.0f%% of `learning_rate`. Fix: set it lower, or train longer",
        *(warmup, steps, 100 * (steps - 1) / warmup),
    )


@torch.no_grad()
def _digests(model: nn.Module) -> dict[str, float]:
    """Return a number for each trained weight that changes when the weight does."""
    return {
        name: torch.linalg.vector_norm(weight, 1, dtype=torch.float64).item() + weight.sum(dtype=torch.float64).item() / 3
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.numel()  # DeepSpeed ZeRO-3 leaves empty ones
    }
