"""Prompts in an order that a resumed run repeats, and checks of `rollout_func`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_recipes.config.ppo import PPOConfig
from rlhf_recipes.core.errors import RecipeError

from datasets import Dataset
from trl.trainer.utils import RepeatSampler


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler, with an order that depends only on the seed and the epoch.

    Parameters:
        epoch: returns the number of the epoch. Accelerate tells it to no sampler of a run of several processes that resumes.
        options: of TRL's sampler.
    """

    def __init__(self, epoch: Callable[[], int], **options: Any):
        super().__init__(**options)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


def fill_batch(dataset: Any, args: PPOConfig) -> Any:
    """Repeat prompts that do not fill a batch: TRL would train on nothing."""
    needed = args.generation_batch_size // args.num_generations
    if not isinstance(dataset, Dataset) or len(dataset) >= needed:
        return dataset
    if not len(dataset):
        raise RecipeError("train_dataset: no prompts. Fix: add rows")
    return dataset.select([row % len(dataset) for row in range(needed)])


def check_rollout_func(rollout: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap `rollout` to refuse prompts and completions without tokens."""

    @functools.wraps(rollout)
    def checked(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = rollout(prompts, trainer)
        where = f"step {trainer.state.global_step}: rollout_func"
        for key, token in (("prompt_ids", "BOS"), ("completion_ids", "EOS")):
            rows = output.get(key) or []
            if key == "completion_ids" and len(rows) != len(prompts):
                raise RecipeError(f"{where}: {len(rows)} completions for {len(prompts)} prompts. Fix: return one for each")
            empty = next((row for row, ids in enumerate(rows) if not len(ids)), None)
            if empty is not None:
                raise RecipeError(
                    f"{where}: {key}: no token in row {empty}, prompt {prompts[empty]!r:.300}. Fix: return {token} at least"
                )
        return output

    return checked
