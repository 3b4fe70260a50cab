"""A reward for meaning the same as a reference."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.hub import explain_load_error
from rlhf_recipes.models.loading import model_path
from rlhf_recipes.rewards.functions import FINITE_FLOATS, Text, last_text, pair_with_references

import torch
from accelerate import PartialState
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

_SAME_MEANING = ("entailment", "equivalent", "paraphrase", "duplicate")  # names of one label in NLI, MRPC, PAWS, QQP


@dataclass(config=FINITE_FLOATS)
class Similarity:
    """How much a completion says what the reference says, in the judgement of a model that was trained to compare two texts.

    To compare two texts is easier than to write one, and supervised learning does it well. So demonstrations can serve as
    references: the policy is free to say the same in its own words, where imitation would ask for the labeller's.

    An empty completion scores 0 without being read. The model is loaded at the first call, without gradients, and needs room
    beside the policy.

    Parameters:
        model_name_or_path: a Hub name or local folder, with weights in safetensors.
        kind: what the model is.
            `"cross-encoder"` reads both texts at once. With one output: its sigmoid, in [0, 1] (STS models of
            sentence-transformers), or the output itself, in the range of its training labels, if the model's configuration
            says `problem_type: regression`. With several: the probability, in [0, 1], of the label that is named entailment
            (NLI), equivalent, paraphrase or duplicate. Both orders are read and the lower score counts, since one-sided
            entailment pays a policy for saying less, or more, than the reference (compare Kuhn et al., 2023).
            `"embedding"` reads each text alone: the cosine, in [-1, 1], of the means of the last hidden states (Reimers and
            Gurevych, 2019). Choose a model that was trained with mean pooling. Cheaper, but it sees a "not" less well.
        batch_size: texts, or pairs of texts, in one forward pass.
        max_length: tokens of a text, or pair, that are read (fewer if the model reads no more); what follows is not judged.
    """

    model_name_or_path: str
    kind: Literal["cross-encoder", "embedding"]
    batch_size: int = Field(default=32, gt=0)
    max_length: int = Field(default=512, gt=0)

    def __call__(
        self, completions: list[Text], reference: list[str | None] | None = None, **columns: Any
    ) -> list[float | None]:
        """Scores (B,), in the range of the model's kind, or None."""
        pairs = [(last_text(one), truth) for one, truth in pair_with_references(completions, reference, "Similarity")]
        scores = [None if truth is None else 0.0 for _, truth in pairs]
        readable = [row for row, (text, truth) in enumerate(pairs) if text and truth is not None]
        if readable:
            compare = self._in_both_orders if self.kind == "cross-encoder" else self._cosine
            for row, score in zip(readable, compare(*zip(*(pairs[row] for row in readable), strict=True)), strict=True):
                scores[row] = score
        return scores

    def _in_both_orders(self, texts: tuple[str, ...], references: tuple[str, ...]) -> list[float]:
        scores = self._read(
            lambda inputs, output: self._sameness(output.logits.float()), texts + references, references + texts
        )
        return scores.view(2, -1).amin(0).tolist()

    def _cosine(self, texts: tuple[str, ...], references: tuple[str, ...]) -> list[float]:
        sums = self._read(  # for a cosine as good as means
            lambda inputs, output: _masked_sum(output.last_hidden_state.float(), inputs["attention_mask"]), texts + references
        )
        return cosine_similarity(*sums.chunk(2)).tolist()

    @torch.no_grad()
    def _read(self, summarise: Callable[[Any, Any], torch.Tensor], *texts: tuple[str, ...]) -> torch.Tensor:
        """What `summarise` makes of the model's inputs and outputs, over all batches; two sequences are read as pairs."""
        tokenizer, model, limit = self._loaded
        results = []
        for start in range(0, len(texts[0]), self.batch_size):
            inputs = tokenizer(
                *(list(part[start : start + self.batch_size]) for part in texts),
                padding=True,
                padding_side="right",  # models with absolute positions count from the left
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            ).to(model.device)
            results.append(summarise(inputs, model(**inputs)))
        return torch.cat(results)

    @cached_property
    def _loaded(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, int]:
        """The tokenizer, the model, and how many tokens are read."""
        auto = AutoModelForSequenceClassification if self.kind == "cross-encoder" else AutoModel
        try:
            path = model_path(ModelConfig(model_name_or_path=self.model_name_or_path))
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            options = {"use_safetensors": True, "trust_remote_code": False}
            model, report = auto.from_pretrained(path, **options, output_loading_info=True)
        except RecipeError as error:
            raise RecipeError(f"Similarity: {error}") from error
        except Exception as error:  # as in `load_architecture`
            raise self._error(explain_load_error(self.model_name_or_path, error)) from error
        # Transformers makes up what a folder lacks: weights at random, and a tokenizer without words
        missing = sorted(weight for weight in report["missing_keys"] if self.kind == "cross-encoder" or "pooler" not in weight)
        if missing:
            raise self._error(f"it is no {self.kind}: its weights lack {', '.join(missing[:3])}")
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise self._error("there is no tokenizer: its folder needs tokenizer.json and tokenizer_config.json")
        if tokenizer.pad_token is None:
            raise self._error("its tokenizer has no PAD")
        limit = min(self.max_length, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", math.inf))
        return tokenizer, model.eval().to(PartialState().device), limit

    def _sameness(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores (B,) of logits (B, number of labels)."""
        config = self._loaded[1].config
        if config.num_labels == 1:
            return logits[:, 0] if config.problem_type == "regression" else logits[:, 0].sigmoid()
        labels = {name.lower(): index for index, name in config.id2label.items()}
        for name in _SAME_MEANING:
            if name in labels:
                return logits.softmax(-1)[:, labels[name]]
        raise self._error(
            f"none of its labels ({', '.join(config.id2label.values())}) is named {', '.join(_SAME_MEANING)}; name them in "
            "`id2label` of its config.json"
        )

    def _error(self, reason: str) -> RecipeError:
        return RecipeError(f"Similarity: model_name_or_path: {self.model_name_or_path}: {reason}")


def _masked_sum(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums (B, H) of states (B, T, H) over the tokens that are not padding."""
    return (states * mask.unsqueeze(-1)).sum(1)
