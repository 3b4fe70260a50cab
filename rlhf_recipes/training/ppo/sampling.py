"""What goes into an iteration of PPO: prompts in an order that can be resumed, rollouts of the user's, pretraining text."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_recipes.config.ppo import PPOConfig
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.backbone import backbone, base_of
from rlhf_recipes.training.ppo.critic import Critic

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import RepeatSampler, pad


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler, whose order in an epoch depends on the seed and on the number of the epoch alone.

    Parameters:
        epoch: returns the number. It is asked: of several processes that resume, Accelerate tells none.
        options: of TRL's.
    """

    def __init__(self, epoch: Callable[[], int], **options: Any):
        super().__init__(**options)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


def at_least_one_batch(dataset: Any, args: PPOConfig) -> Any:
    """The prompts, repeated where they are too few for one batch of completions: TRL would train on none."""
    needed = args.generation_batch_size // args.num_generations
    if not isinstance(dataset, Dataset) or len(dataset) >= needed:
        return dataset
    if not len(dataset):
        raise RecipeError("train_dataset: there is no prompt in it")
    return dataset.select([row % len(dataset) for row in range(needed)])


def check_rollouts(rollout: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`rollout`, which stops the run where it returns a prompt or a completion without a token, or the wrong number of them."""

    @functools.wraps(rollout)
    def checked(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = rollout(prompts, trainer)
        completions = output.get("completion_ids")
        where = f"step {trainer.state.global_step}: rollout_func"
        if completions is not None and len(completions) != len(prompts):
            raise RecipeError(f"{where} returned {len(completions)} completions for {len(prompts)} prompts")
        for row, ids in enumerate(output.get("prompt_ids") or ()):
            if not len(ids):
                raise RecipeError(
                    f"{where} returned a prompt without a token for prompt {row} of the batch, so there is no state in which "
                    f"its completion began; let it begin with BOS at least; the prompt: {prompts[row]!r:.300}"
                )
        for row, ids in enumerate(completions or ()):
            if not len(ids):
                raise RecipeError(
                    f"{where} returned a completion without a token for prompt {row} of the batch, from which there is nothing "
                    f"to learn; let it end with EOS at least; the prompt: {prompts[row]!r:.300}"
                )
        return output

    return checked


class GenerationRecorder:
    """What the sampler computes on its way, kept: log-probabilities of the tokens that it samples, and values of the states.

    Within the context, every step of `generate` is watched. Logits are kept of one step at a time.

    Parameters:
        model: the language model that generates, with or without adapters.
        temperature: that the logits are divided by.
        critic: one that reads the policy's hidden states, or None.
    """

    def __init__(self, model: nn.Module, temperature: float, critic: Critic | None):
        self.model, self.temperature, self.critic = model, temperature, critic
        self._hidden, self._logits = None, None
        self._logps: list[Tensor] = []
        self._values: list[Tensor] = []

    def __enter__(self) -> "GenerationRecorder":
        self._handles = [
            backbone(self.model).register_forward_hook(self._after_trunk),
            base_of(self.model).register_forward_hook(self._after_step, with_kwargs=True),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _after_trunk(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        self._hidden = outputs.last_hidden_state[:, -1:]

    def _after_step(self, module: nn.Module, arguments: Any, options: dict[str, Any], outputs: Any) -> None:
        if self._logits is not None:  # the token that these gave rise to is what the next step reads
            self._logps.append(self._logp_of(options["input_ids"][:, -1:]))
        self._logits = outputs.logits[:, -1].float() / self.temperature
        if self.critic is not None:
            self._values.append(self.critic(self._hidden, None, None, 1))

    def _logp_of(self, tokens: Tensor) -> Tensor:
        return self._logits.gather(1, tokens) - self._logits.logsumexp(1, keepdim=True)

    def of(self, completion_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and values, (B, T) each, of these completions; what stands at padding does not matter.

        Args:
            completion_ids: as the sampler returned them, (B, T), padded on the right.
        """
        steps = len(self._logps)
        logps = torch.cat([*self._logps, self._logp_of(completion_ids[:, steps : steps + 1])], dim=1)
        values = torch.cat(self._values, dim=1) if self.critic is not None else None
        return pad_right(logps, completion_ids.size(1)), None if values is None else pad_right(values, completion_ids.size(1))


class GenerationRecorders:
    """The records of batches that were sampled one after the other, as one.

    Parameters:
        records: of each batch.
        size: completions of each but the last.
    """

    def __init__(self, records: list[GenerationRecorder], size: int):
        self.records, self.size = records, size

    def of(self, completion_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `GenerationRecorder.of`, of the completions of all batches."""
        parts = zip(self.records, completion_ids.split(self.size), strict=True)
        logps, values = zip(*(record.of(ids) for record, ids in parts), strict=True)
        return torch.cat(logps), None if values[0] is None else torch.cat(values)


def pad_right(values: Tensor, count: int) -> Tensor:
    """(B, kept) padded with 0 on the right to (B, count)."""
    return nn.functional.pad(values, (0, count - values.size(1)))


class PretrainingText:
    """Micro-batches of pretraining text, in an order that depends on the seed and on the number of the micro-batch alone.

    Parameters:
        dataset: with the column `text`.
        tokenizer: of the policy.
        args: for `ptx_batch_size`, `ptx_max_length` and `seed`.

    Raises:
        RecipeError: without a dataset, or without texts.
    """

    def __init__(self, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase, args: PPOConfig):
        if dataset is None or "text" not in dataset.column_names or not len(dataset):
            raise RecipeError("ptx_coef: needs `ptx_dataset`: pretraining text, in the column `text`")
        if (blank := next((row for row, text in enumerate(dataset["text"]) if not text.strip()), None)) is not None:
            raise RecipeError(f"ptx_dataset: row {blank} has no text: leave it out")
        self.texts, self.tokenizer, self.length, self.seed = dataset, tokenizer, args.ptx_max_length, args.seed
        self.size = args.ptx_batch_size or args.per_device_train_batch_size

    def batch(self, step: int, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        """Ids and mask, (size, T), padded on the right.

        Args:
            step: number of the micro-batch in the run.
            accelerator: each process has texts of its own.
        """
        rows = list(self._rows(step * accelerator.num_processes + accelerator.process_index))
        ids = [torch.tensor(self._encode(self.texts[row]["text"])) for row in rows]
        mask = pad([torch.ones_like(text) for text in ids], padding_value=0, padding_side="right")
        return pad(ids, padding_value=self.tokenizer.pad_token_id, padding_side="right"), mask

    def _rows(self, number: int) -> Iterator[int]:
        """Numbers of the rows of a micro-batch: one permutation after the other, end to end."""
        for place in range(number * self.size, (number + 1) * self.size):
            lap, row = divmod(place, len(self.texts))
            yield self._permutation(lap)[row]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the trainer
    def _permutation(self, lap: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + lap)
        return torch.randperm(len(self.texts), generator=generator).tolist()

    def _encode(self, text: str) -> list[int]:
        ids, end = self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id
        return (ids if ids[-1:] == [end] else [*ids, end])[: self.length]
