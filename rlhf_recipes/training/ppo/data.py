"""Data of PPO: the order of prompts, checks of rollouts, pretraining text."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_recipes.config.ppo import PPOConfig
from rlhf_recipes.core.errors import RecipeError

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import RepeatSampler, pad

logger = logging.getLogger(__name__)


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
    logger.warning(
        "per_device_train_batch_size: %d prompts do not fill a rollout of %d: they are repeated. Fix: lower it, or add rows",
        *(len(dataset), needed),
    )
    return dataset.select([row % len(dataset) for row in range(needed)])


def check_rollout_func(rollout: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap `rollout` to refuse prompts and completions without tokens."""

    @functools.wraps(rollout)
    def checked(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = rollout(prompts, trainer)
        where = f"step {trainer.state.global_step}: rollout_func"
        for key, token in (("prompt_ids", "BOS"), ("completion_ids", "EOS")):
            if len(output[key]) != len(prompts):
                raise RecipeError(f"{where}: {key}: {len(output[key])} for {len(prompts)} prompts. Fix: return one for each")
            for prompt, ids in zip(prompts, output[key], strict=True):
                if not len(ids):
                    raise RecipeError(f"{where}: {key}: no token for prompt {prompt!r:.300}. Fix: return {token} at least")
        return output

    return checked


class PretrainingText:
    """Micro-batches of text for `ptx_coef`, in the order of the seed.

    Parameters:
        dataset: with the column `text`.
        tokenizer: of the policy.
        args: for `ptx_batch_size`, `ptx_max_length` and `seed`.

    Raises:
        RecipeError: without texts.
    """

    def __init__(self, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase, args: PPOConfig):
        if dataset is None or "text" not in dataset.column_names or not len(dataset):
            raise RecipeError("ptx_coef: no pretraining text. Fix: set `ptx_dataset` to data with a column `text`")
        self.texts, self.tokenizer, self.max_length, self.seed = dataset, tokenizer, args.ptx_max_length, args.seed
        self.batch_size = args.ptx_batch_size or args.per_device_train_batch_size

    def batch(self, step: int, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        """Return ids and mask of micro-batch `step`, (batch_size, T), padded on the right.

        Each process reads other texts.
        """
        number = step * accelerator.num_processes + accelerator.process_index
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        rows = [self._permutation(place // len(self.texts))[place % len(self.texts)] for place in places]
        ids = [torch.tensor(self._encode(self.texts[row]["text"])) for row in rows]
        mask = pad([torch.ones_like(text) for text in ids], padding_value=0, padding_side="right")
        return pad(ids, padding_value=self.tokenizer.pad_token_id, padding_side="right"), mask

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the trainer
    def _permutation(self, lap: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + lap)
        return torch.randperm(len(self.texts), generator=generator).tolist()

    def _encode(self, text: str) -> list[int]:
        ids, eos = self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id
        return (ids if ids[-1:] == [eos] else [*ids, eos])[: self.max_length]
