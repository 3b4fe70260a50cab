"""Pretraining text for the language-modelling loss of PPO-ptx (`ptx_coef`)."""

import functools
from collections.abc import Iterator

from rlhf_recipes.config.ppo import PPOConfig
from rlhf_recipes.core.errors import RecipeError

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import pad


class PretrainingText:
    """Micro-batches of text, in an order that depends on the seed alone.

    Parameters:
        dataset: with the column `text`.
        tokenizer: of the policy.
        args: for `ptx_batch_size`, `ptx_max_length` and `seed`.

    Raises:
        RecipeError: without texts, or for a blank one.
    """

    def __init__(self, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase, args: PPOConfig):
        if dataset is None or "text" not in dataset.column_names or not len(dataset):
            raise RecipeError("ptx_coef: no pretraining text. Fix: set `ptx_dataset` to data with a column `text`")
        if (blank := next((row for row, text in enumerate(dataset["text"]) if not text.strip()), None)) is not None:
            raise RecipeError(f"ptx_dataset: row {blank} has no text. Fix: leave it out")
        self.texts, self.tokenizer, self.max_length, self.seed = dataset, tokenizer, args.ptx_max_length, args.seed
        self.batch_size = args.ptx_batch_size or args.per_device_train_batch_size

    def batch(self, step: int, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        """Return ids and mask of one micro-batch, (batch_size, T), padded on the right.

        Args:
            step: number of the micro-batch in the run.
            accelerator: each process reads other texts.
        """
        rows = list(self._rows(step * accelerator.num_processes + accelerator.process_index))
        ids = [torch.tensor(self._encode(self.texts[row]["text"])) for row in rows]
        mask = pad([torch.ones_like(text) for text in ids], padding_value=0, padding_side="right")
        return pad(ids, padding_value=self.tokenizer.pad_token_id, padding_side="right"), mask

    def _rows(self, number: int) -> Iterator[int]:
        """Yield the rows of a micro-batch, from one permutation after the other."""
        for place in range(number * self.batch_size, (number + 1) * self.batch_size):
            lap, row = divmod(place, len(self.texts))
            yield self._permutation(lap)[row]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the trainer
    def _permutation(self, lap: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + lap)
        return torch.randperm(len(self.texts), generator=generator).tolist()

    def _encode(self, text: str) -> list[int]:
        ids, eos = self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id
        return (ids if ids[-1:] == [eos] else [*ids, eos])[: self.max_length]
