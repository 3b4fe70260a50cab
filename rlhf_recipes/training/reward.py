"""Training of reward models: TRL's `RewardTrainer` with rankings of K completions."""

import logging
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.backbone import base_name
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.kernels import keep_forward
from rlhf_recipes.models.tokenizer import encode
from rlhf_recipes.rewards.reward_json import write_reward_record
from rlhf_recipes.training.trainers import TrainerMixin

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import global_then_local_main_first, pad

logger = logging.getLogger(__name__)


def ranking_loss(rewards: Tensor, ranks: Tensor, center_rewards_coefficient: float | None = None) -> Tensor:
    """Return InstructGPT's loss on rankings, averaged over the batch; a scalar.

    Each comparison in a ranking of K completions weighs 1 / (K (K - 1) / 2). Ties are not comparisons, so a ranking with ties
    weighs less. Ouyang et al., 2022, equation 1.

    Args:
        rewards: (B, K), with the K of the longest ranking; padding may hold any value.
        ranks: (B, K) whole numbers, the best 0; -1 is padding.
        center_rewards_coefficient: weight of the squared sum of the two rewards of a comparison, as in TRL; or None.
    """
    better = comparisons(ranks)
    rewards = rewards.masked_fill(ranks < 0, 0.0)  # before the loss: in the gradient, 0 times NaN is NaN
    losses = -nn.functional.logsigmoid(rewards[:, :, None] - rewards[:, None, :])
    if center_rewards_coefficient is not None:
        losses = losses + center_rewards_coefficient * (rewards[:, :, None] + rewards[:, None, :]) ** 2
    k = (ranks >= 0).sum(1)
    pairs = (k * (k - 1) / 2).clamp(min=1)
    return (losses.masked_fill(~better, 0.0).sum((1, 2)) / pairs).mean()


def comparisons(ranks: Tensor) -> Tensor:
    """Return where one completion beats another: bool (B, K, K), from ranks (B, K)."""
    first, second = ranks[:, :, None], ranks[:, None, :]
    return (first >= 0) & (first < second)


class RankingCollator(DataCollatorForPreference):
    """Collator of rankings (`ranked_ids`: K lists of ids, `ranks`) and of pairs.

    A batch of B rankings with N completions in all has:

    - `input_ids`, `attention_mask`: (N, T), padded on the right, ranking after ranking
    - `ranks`: (B, largest K) whole numbers, the best 0, padded with -1
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch of tensors."""
        if "ranked_ids" not in examples[0]:
            return super().torch_call(examples)
        ids = [torch.tensor(completion) for example in examples for completion in example["ranked_ids"]]
        options = {"padding_side": "right", "pad_to_multiple_of": self.pad_to_multiple_of}
        return {
            "input_ids": pad(ids, padding_value=self.pad_token_id, **options),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, **options),
            "ranks": pad([_dense(example["ranks"]) for example in examples], padding_value=-1, padding_side="right"),
        }


class RankingTrainer(TrainerMixin, RewardTrainer):
    """TRL's `RewardTrainer` that takes rankings, with one pass for each completion.

    Rows of `prompt, chosen, rejected` (and `margin`) train as in TRL. Rows of `prompt, completions, ranks`, where lower ranks
    are better, train by `ranking_loss`: a batch of `per_device_train_batch_size` rankings has K times as many sequences. Rows
    with a sequence longer than `max_length` are dropped, with a warning. `reward.json` is saved with every checkpoint.
    """

    def __init__(self, model: PreTrainedModel | PeftModel | str, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        keep_forward(self.args)
        if type(self.data_collator) is DataCollatorForPreference:
            self.data_collator = RankingCollator(self.data_collator.pad_token_id, self.data_collator.pad_to_multiple_of)
        self._base_fingerprint = fingerprint(self.model)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if {"completions", "ranked_ids"} & {*get_dataset_column_names(dataset)}:
            prepared = _prepare_rankings(dataset, processing_class, args)
        else:
            prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset):
            _report_dropped(dataset_name, len(dataset), len(prepared), args.max_length)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*{*self._signature_columns, "ranked_ids", "ranks"}]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss of a batch, and with `return_outputs` the model's output."""
        if "ranks" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ranks = inputs["ranks"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        scores = outputs.logits.squeeze(-1)
        # Completions come in the order of `ranks`, row by row
        rewards = scores.new_zeros(ranks.shape).masked_scatter(ranks >= 0, scores)
        loss = ranking_loss(rewards, ranks, self.args.center_rewards_coefficient)
        self._log_rankings(scores.detach(), rewards.detach(), ranks, inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss

    def _log_rankings(self, scores: Tensor, rewards: Tensor, ranks: Tensor, mask: Tensor) -> None:
        """Add the metrics that TRL logs for pairs, of this batch of all processes."""
        mode = "train" if self.model.training else "eval"
        differences = (rewards[:, :, None] - rewards[:, None, :])[comparisons(ranks)]
        # One row per process, since the numbers of completions may differ
        row = [mask.sum(), scores.sum(), len(scores), (differences > 0).sum(), differences.sum(), len(differences)]
        rows = self.accelerator.gather(torch.tensor([[float(value) for value in row]], device=scores.device))
        extremes = self.accelerator.gather(torch.stack([scores.min(), scores.max()])[None])
        tokens, total, count, correct, margin, compared = rows.sum(0).tolist()
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["min_reward"].append(extremes[:, 0].min().item())
        metrics["mean_reward"].append(total / count)
        metrics["max_reward"].append(extremes[:, 1].max().item())
        if compared:
            metrics["accuracy"].append(correct / compared)
            metrics["margin"].append(margin / compared)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizer and `reward.json`."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_reward_record(folder, base_name(self.model), self._base_fingerprint)
        super().save_model(output_dir, _internal_call)


def _prepare_rankings(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: RewardConfig) -> Dataset:
    with global_then_local_main_first():
        if "ranked_ids" not in dataset.column_names:
            columns = [column for column in dataset.column_names if column != "ranks"]
            options = {"remove_columns": columns, "num_proc": args.dataset_num_proc, "desc": "Tokenizing rankings"}
            dataset = dataset.map(_encode_ranking, fn_kwargs={"tokenizer": tokenizer}, **options)
        if args.max_length is not None:
            longest = args.max_length
            dataset = dataset.filter(lambda row: max(map(len, row["ranked_ids"])) <= longest)
    return dataset


def _encode_ranking(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    return {"ranked_ids": [encode(tokenizer, row["prompt"], completion) for completion in row["completions"]]}


def _report_dropped(name: str, before: int, after: int, max_length: int | None) -> None:
    if not after:
        raise RecipeError(f"max_length: {max_length}: all {before} rows of `{name}` are longer. Fix: raise it")
    if after < before:
        logger.warning("%s: %d of %d rows are dropped: longer than `max_length: %s`", name, before - after, before, max_length)


def _dense(ranks: list[float]) -> Tensor:
    """Return ranks as whole numbers from 0 without gaps, with the same order and ties."""
    order = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    return torch.tensor([order[rank] for rank in ranks])
