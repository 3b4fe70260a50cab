"""A reward for meaning the same as a reference."""

import importlib.util
import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.hub import explain_load_error
from rlhf_recipes.models.loading import model_path
from rlhf_recipes.rewards.functions import FINITE_FLOATS, References, pair_with_references
from rlhf_recipes.rewards.protocol import Text

import torch
from accelerate import PartialState
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch.nn.functional import cosine_similarity
from transformers.utils import cached_file
from trl import ModelConfig

logger = logging.getLogger(__name__)
_SAME_MEANING = ("entailment", "equivalent", "paraphrase", "duplicate")  # label names of NLI, MRPC, PAWS and QQP models


@dataclass(config=FINITE_FLOATS)
class Similarity:
    """How far a completion means the same as the reference, by a model.

    Comparing two texts is easier than writing one, and supervised models do it well. So demonstrations can serve as references,
    and the policy may use its own words. An empty completion scores 0. The model loads at the first call, without gradients,
    and needs memory beside the policy. Needs the extra `similarity` (sentence-transformers).

    Parameters:
        model_name_or_path: Hub name or local folder, with weights in safetensors.
        kind: what the model is.
            `"cross-encoder"` reads both texts at once. With one output, the score is its sigmoid, in [0, 1], or the output
            itself if the model's configuration has `problem_type: regression`. With several outputs, it is the probability of
            the label named entailment (NLI), equivalent, paraphrase or duplicate. Both orders are read and the lower score
            counts: one-sided entailment rewards a policy for writing less, or more, than the reference (compare Kuhn et al.,
            2023).
            `"embedding"` reads each text alone. The score is the cosine of the two embeddings, in [-1, 1] (Reimers and
            Gurevych, 2019), with the pooling that is saved with the model. Cheaper, but less sensitive to a "not".
        batch_size: texts, or pairs of texts, in a forward pass.
        max_length: tokens of a text or pair that are read; fewer if the model reads fewer.
    """

    model_name_or_path: str
    kind: Literal["cross-encoder", "embedding"]
    compares_references: ClassVar[bool] = True
    batch_size: int = Field(default=32, gt=0)
    max_length: int = Field(default=512, gt=0)

    def __post_init__(self):
        if importlib.util.find_spec("sentence_transformers") is None:
            raise RecipeError("Similarity: needs sentence-transformers. Fix: pip install --editable '.[similarity]'")

    def __call__(self, completions: list[Text], reference: References = None, **columns: Any) -> list[float | None]:
        """Return scores (B,), by the nearest reference; None for rows without one."""
        rows = pair_with_references(completions, reference, "Similarity")
        pairs = [(text, truth) for text, accepted in rows for truth in accepted if text]
        compare = self._cross_encode if self.kind == "cross-encoder" else self._embed
        scores = iter(compare(pairs).tolist() if pairs else [])
        return [max((next(scores) for _ in accepted if text), default=0.0) if accepted else None for text, accepted in rows]

    def _cross_encode(self, pairs: list[tuple[str, str]]) -> torch.Tensor:
        both_orders = [*pairs, *((truth, text) for text, truth in pairs)]
        options = {"activation_fn": torch.nn.Identity(), "convert_to_tensor": True, "show_progress_bar": False}
        logits = self._model.predict(both_orders, batch_size=self.batch_size, **options).float()
        return self._same_meaning(logits.view(2 * len(pairs), -1)).view(2, -1).amin(0)

    def _embed(self, pairs: list[tuple[str, str]]) -> torch.Tensor:
        texts = [text for text, _ in pairs] + [truth for _, truth in pairs]
        options = {"convert_to_tensor": True, "show_progress_bar": False}
        return cosine_similarity(*self._model.encode(texts, batch_size=self.batch_size, **options).float().chunk(2))

    def _same_meaning(self, logits: torch.Tensor) -> torch.Tensor:
        """Return scores (B,) of logits (B, labels)."""
        config = self._model.config
        if logits.shape[1] == 1:
            return logits[:, 0] if config.problem_type == "regression" else logits[:, 0].sigmoid()
        labels = {name.lower(): index for index, name in config.id2label.items()}
        for name in _SAME_MEANING:
            if name in labels:
                return logits.softmax(-1)[:, labels[name]]
        raise self._error(
            f"none of its labels ({', '.join(config.id2label.values())}) is named {', '.join(_SAME_MEANING)}. Fix: name them "
            "in `id2label` of its config.json"
        )

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import CrossEncoder, SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Transformer

        architecture = CrossEncoder if self.kind == "cross-encoder" else SentenceTransformer
        try:
            path = model_path(ModelConfig(model_name_or_path=self.model_name_or_path))
            options = {"device": str(PartialState().device), "trust_remote_code": False}
            model = architecture(path, model_kwargs={"use_safetensors": True}, **options)
        except RecipeError as error:
            raise RecipeError(f"Similarity: {error}") from error
        except Exception as error:  # config.json, weights, tokenizer and the Hub each raise their own
            raise self._error(explain_load_error(self.model_name_or_path, error)) from error
        # The other kinds of first module (static embeddings, ...) check their weights themselves, and have no limit of length
        if self.kind == "cross-encoder" or isinstance(model[0], Transformer):
            self._check_transformer(model, path)
            model.max_seq_length = min(self.max_length, model.max_seq_length or self.max_length)
        return model

    def _check_transformer(self, model: Any, path: str) -> None:
        """Refuse weights that its files lack, and an invented tokenizer."""
        modules = cached_file(path, "modules.json", _raise_exceptions_for_missing_entries=False)
        folder = json.loads(Path(modules).read_text())[0]["path"] if modules and self.kind == "embedding" else ""
        network = model[0].auto_model if self.kind == "embedding" else model.model
        # sentence-transformers keeps the report of loading to itself; on the meta device a second one takes no memory
        options = {"subfolder": folder, "use_safetensors": True, "output_loading_info": True, "device_map": "meta"}
        _, report = type(network).from_pretrained(network.name_or_path, **options)
        missing = sorted(name for name in report["missing_keys"] if self.kind == "cross-encoder" or "pooler" not in name)
        if missing:
            raise self._error(f"not a {self.kind}: its files lack {', '.join(missing[:3])}, which would be random")
        if len(model.tokenizer) <= len(model.tokenizer.all_special_tokens):  # invented where tokenizer.json is missing
            raise self._error("no tokenizer. Fix: add tokenizer.json and tokenizer_config.json to its folder")
        if self.kind == "embedding" and not modules:
            logger.warning("Similarity: %s has no modules.json: it is read with %s pooling", path, model[1].pooling_mode)

    def _error(self, reason: str) -> RecipeError:
        return RecipeError(f"Similarity: model_name_or_path: {self.model_name_or_path}: {reason}")
