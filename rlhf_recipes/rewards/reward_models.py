"""Reward models and ensembles as roles on a shared base."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.backbone import backbone, forward_backbone
from rlhf_recipes.models.roles import use_adapter
from rlhf_recipes.models.tokenizer import answer_messages, encode
from rlhf_recipes.rewards.reward_json import Normalisation, store_normalisation

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

HEAD = "score"
"""Transformers' name for the head of a decoder that classifies sequences."""
HEAD_IN_ADAPTER = f"base_model.model.{HEAD}.weight"
"""The name of its weight in PEFT's files."""
Messages = list[dict[str, Any]]


class ScalarHead(nn.Linear):
    """A head with one output, computed in fp32 on any base and under autocast.

    bf16 has three digits: too few to tell good answers from better ones. Its weight is saved and loaded like that of
    Transformers' head.
    """

    def __init__(self, width: int, bias: bool = False):
        super().__init__(width, 1, bias=bias, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return scores, fp32 (..., 1), of hidden states (..., width)."""
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)


class Scorer(ABC):
    """A model that scores completions; a reward function for TRL's trainers.

    Parameters:
        name: under which TRL logs the rewards.
        tokenizer: of the policy and the reward model.
        batch_size: completions in a forward pass, when called as a reward function.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    @property
    def __name__(self) -> str:
        return self.name

    @abstractmethod
    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return scores, fp32 (B,), of padded sequences (B, T)."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """Return the score of each completion, in TRL's protocol for reward functions.

        Completions are encoded as in training: conversations by the chat template, texts with EOS at the end. A completion that
        was truncated before its EOS is scored as if it ended there.

        Prompts are texts, or lists of messages, and completions of the same kind.
        """
        completions = answer_messages(self.tokenizer, prompts, completions, kwargs.get("completion_ids"))
        sequences = [encode(self.tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))  # similar lengths: little padding
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            ids = [torch.tensor(sequences[row]) for row in rows]
            mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
            batch = self.score(pad_sequence(ids, batch_first=True), mask)
            for row, score in zip(rows, batch.tolist(), strict=True):
                scores[row] = score
        return scores


@dataclass(eq=False)
class RewardModel(Scorer):
    """A reward model: an adapter on a shared base, or a full model.

    Scoring restores everything: active adapters, what is trained, and training mode.

    Parameters:
        model: the base with its adapters, or a sequence classifier.
        adapter: name of the adapter to score with, or None for a full model.
        head: hidden state -> raw score.
        normalisation: of raw scores; None leaves them raw.
        folder: that it was loaded from.
    """

    model: nn.Module
    adapter: str | None
    head: ScalarHead
    tokenizer: PreTrainedTokenizerBase
    normalisation: Normalisation | None
    folder: Path
    name: str
    batch_size: int

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor, normalise: bool = True) -> Tensor:
        """Return scores, fp32 (B,): the head's output at the last token of each sequence.

        Sequences (B, T) may be padded on either side.

        Raises:
            ValueError: if a sequence is empty.
        """
        ids, mask = _pad_right(input_ids, attention_mask)
        device = backbone(self.model).get_input_embeddings().weight.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        with use_adapter(self.model, self.adapter):
            hidden = forward_backbone(self.model, **inputs).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1).to(hidden.device) - 1]
        scores = self.head(last.to(self.head.weight.device))[:, 0]
        return self.normalisation(scores) if normalise and self.normalisation else scores

    def calibrate(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Normalisation:
        """Measure and store the normalisation by demonstrations.

        Raises:
            RecipeError: if all of them score the same.
        """
        before, self.normalisation = self.normalisation, None
        try:
            before = store_normalisation(self.folder, self(prompts, completions))
        finally:
            self.normalisation = before
        return before


@dataclass(eq=False)
class Ensemble(Scorer):
    """Several reward models as one (Coste et al., 2024, arXiv 2310.02743).

    Scores are combined after each member's normalisation, since raw scores of two models have no common scale.

    Parameters:
        members: the reward models; adapters on one base, or full models.
        combine: `"mean"`, `"min"`, or `"uncertainty"`: the mean minus `uncertainty_coef` standard deviations.
        uncertainty_coef: 0 or more; used by `"uncertainty"` only.

    Raises:
        RecipeError: for another value of `combine`, or a negative coefficient.
    """

    members: Sequence[RewardModel]
    combine: Literal["mean", "min", "uncertainty"] = "mean"
    uncertainty_coef: float = 1.0
    name: str = "ensemble"

    def __post_init__(self):
        if self.combine not in ("mean", "min", "uncertainty"):
            raise RecipeError(f"combine: {self.combine!r}: must be mean, min or uncertainty")
        if not self.uncertainty_coef >= 0:
            raise RecipeError(f"uncertainty_coef: {self.uncertainty_coef}: must be 0 or more")
        if self.members:
            self.tokenizer, self.batch_size = self.members[0].tokenizer, self.members[0].batch_size

    @property
    def scale(self) -> float:
        """The mean of the members' deviations, which turns scores into log-odds."""
        stds = [member.normalisation.std if member.normalisation else 1.0 for member in self.members]
        return sum(stds) / len(stds)

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return combined scores, fp32 (B,), of padded sequences (B, T)."""
        return self.combine_scores(self.member_scores(input_ids, attention_mask))

    def member_scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the scores of each member, (members, B)."""
        return torch.stack([member.score(input_ids, attention_mask) for member in self.members])

    def combine_scores(self, scores: Tensor) -> Tensor:
        """Return scores (B,) from those of the members, (members, B)."""
        if self.combine == "min":
            return scores.amin(0)
        if self.combine == "mean":
            return scores.mean(0)
        return scores.mean(0) - self.uncertainty_coef * scores.std(0, correction=0)


def _pad_right(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding to the right, as in training, and trim to the longest sequence."""
    lengths = attention_mask.sum(1)
    if not lengths.all():
        raise ValueError("a sequence without tokens has no score")
    order = attention_mask.bool().logical_not().long().argsort(dim=1, stable=True)[:, : lengths.max()]
    return input_ids.gather(1, order), attention_mask.gather(1, order)
