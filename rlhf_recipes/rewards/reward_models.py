"""Reward models and ensembles of them, as roles on a base that others share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.backbone import backbone, forward_backbone
from rlhf_recipes.models.roles import use_adapter
from rlhf_recipes.models.tokenizer import encode, template_gap
from rlhf_recipes.rewards.reward_json import Normalisation, is_fp32_number, store_normalisation

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

HEAD = "score"
"""The name that Transformers gives the head of a decoder that classifies sequences."""
Messages = list[dict[str, Any]]


class ScalarHead(nn.Linear):
    """One number for each hidden state, computed in fp32 whatever the type of the base and under autocast too.

    bf16 has three digits: too few to tell good answers from better ones. Its weight is saved and loaded as that of
    Transformers' own head.
    """

    def __init__(self, width: int, bias: bool = False):
        super().__init__(width, 1, bias=bias, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores, fp32 of shape (..., 1), of hidden states (..., width)."""
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)


class Scorer(ABC):
    """Anything that scores completions, and is a reward function for TRL's trainers.

    Parameters:
        name: what TRL logs the rewards under.
        tokenizer: of the policy, which is that of the reward model too.
        batch_size: completions a forward pass, when called as a reward function.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        self.__name__ = name
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @abstractmethod
    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores, fp32 of shape (B,), of padded sequences (B, T)."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """The score of each completion, in TRL's protocol for reward functions.

        Completions are read as in training: conversations through the chat template, and texts with EOS behind. So a
        completion that was cut off before its EOS is scored as if it ended there: whoever minds must look at the tokens.

        Args:
            prompts: texts, or lists of messages.
            completions: one for each prompt, of the same kind.
            kwargs: what else TRL passes; not used.
        """
        sequences = [
            encode(self.tokenizer, prompt, self._as_written(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))  # alike lengths: little padding
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = self.score(*_padded([sequences[place] for place in places]))
            for place, score in zip(places, batch.tolist(), strict=True):
                scores[place] = score
        return scores

    def _as_written(self, completion: Any) -> Any:
        """A generated answer without the space that the template puts before it: rendered again, it would stand there twice."""
        if isinstance(completion, str) or not completion:
            return completion
        first, *others = completion
        return [{**first, "content": (first.get("content") or "").removeprefix(template_gap(self.tokenizer))}, *others]


class RewardModel(Scorer):
    """A reward model: an adapter on a base that it shares with other roles, or a model of its own.

    Scoring leaves everything as it was: which adapters are active, what is trained, training mode, and every weight.

    Parameters:
        model: the base with its adapters, or a sequence classifier.
        adapter: the name of the adapter to score by, or None for a model of its own.
        head: hidden state -> raw score.
        normalisation: applied to raw scores; None: scores stay raw.
        folder: where it was loaded from.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str | None,
        head: ScalarHead,
        tokenizer: PreTrainedTokenizerBase,
        normalisation: Normalisation | None,
        folder: Path,
        name: str,
        batch_size: int,
    ):
        super().__init__(name, tokenizer, batch_size)
        self.model, self.adapter, self.head = model, adapter, head
        self.normalisation, self.folder = normalisation, folder

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor, normalise: bool = True) -> Tensor:
        """Scores, fp32 of shape (B,): the head's value at the last token of each sequence.

        Args:
            input_ids: (B, T), padded on the right or on the left.
            attention_mask: (B, T), 1 on tokens and 0 on padding.
            normalise: whether to apply the stored normalisation.

        Raises:
            ValueError: if a sequence has no token.
        """
        ids, mask = _right_padded(input_ids, attention_mask)
        device = backbone(self.model).get_input_embeddings().weight.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        with use_adapter(self.model, self.adapter):
            hidden = forward_backbone(self.model, **inputs).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1).to(hidden.device) - 1]
        scores = self.head(last.to(self.head.weight.device))[:, 0]
        return self.normalisation(scores) if normalise and self.normalisation else scores

    def calibrate(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Normalisation:
        """Measures and stores the normalisation: from now on these demonstrations score 0 on average with deviation 1.

        Raises:
            RecipeError: if all of them score alike.
        """
        before, self.normalisation = self.normalisation, None
        try:
            self.normalisation = store_normalisation(self.folder, self(prompts, completions))
        except BaseException:
            self.normalisation = before
            raise
        return self.normalisation


class Ensemble(Scorer):
    """Several reward models as one (Coste et al., 2024, "Reward model ensembles help mitigate overoptimization").

    Each member's own normalisation comes first, since raw scores of two models have no common scale.

    Parameters:
        members: the reward models; adapters on one base, or models of their own.
        combine: `"mean"`, `"min"`, or `"uncertainty"`: the mean less `uncertainty_coef` standard deviations.
        uncertainty_coef: 0 or more; read under `"uncertainty"` only.

    Raises:
        RecipeError: without members, for an unknown way to combine, or a negative coefficient.
    """

    def __init__(
        self,
        members: Sequence[RewardModel],
        combine: Literal["mean", "min", "uncertainty"] = "mean",
        uncertainty_coef: float = 1.0,
        name: str = "ensemble",
    ):
        if not members:
            raise RecipeError("an ensemble needs at least one reward model")
        if combine not in ("mean", "min", "uncertainty"):
            raise RecipeError(f"an ensemble is combined by mean, min or uncertainty, not by {combine!r}")
        if not (is_fp32_number(uncertainty_coef) and uncertainty_coef >= 0):
            raise RecipeError(f"uncertainty_coef: {uncertainty_coef}: must be 0 or more")
        super().__init__(name, members[0].tokenizer, members[0].batch_size)
        self.members, self.combine, self.uncertainty_coef = list(members), combine, uncertainty_coef

    @property
    def scale(self) -> float:
        """The mean deviation that the members' scores were divided by: it makes combined scores log-odds again, about."""
        stds = [member.normalisation.std if member.normalisation else 1.0 for member in self.members]
        return sum(stds) / len(stds)

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Combined scores, fp32 of shape (B,), of padded sequences (B, T)."""
        return self.combined(self.member_scores(input_ids, attention_mask))

    def member_scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The scores of each member, (members, B); `.std(0, correction=0)` of them is what "uncertainty" subtracts."""
        return torch.stack([member.score(input_ids, attention_mask) for member in self.members])

    def combined(self, scores: Tensor) -> Tensor:
        """Scores (B,) from those of the members, (members, B)."""
        if self.combine == "min":
            return scores.amin(0)
        if self.combine == "mean":
            return scores.mean(0)
        return scores.mean(0) - self.uncertainty_coef * scores.std(0, correction=0)


def _padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, T), padded on the right; what padding holds does not matter, since the mask is 0 there."""
    length = max(map(len, sequences))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in sequences])
    return ids, mask


def _right_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same sequences with the padding on the right, as in training, and cut to the longest of them."""
    lengths = attention_mask.sum(1)
    if not lengths.all():
        raise ValueError("a sequence without a token has no score")
    order = attention_mask.bool().logical_not().long().argsort(dim=1, stable=True)[:, : lengths.max()]
    return input_ids.gather(1, order), attention_mask.gather(1, order)
