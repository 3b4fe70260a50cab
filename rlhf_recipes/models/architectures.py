"""Sequence classifiers for families that Transformers has none for."""

from typing import Any

from rlhf_recipes.core.errors import RecipeError

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.modeling_outputs import SequenceClassifierOutput


class _Classifier:
    """A backbone with the head `score`, as Transformers' classes of this kind."""

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, AutoModel.from_config(config))
        self.score = nn.Linear(config.get_text_config().hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> SequenceClassifierOutput:
        """Return as logits (B, labels) the scores at the last token of each sequence."""
        options = {name: value for name, value in kwargs.items() if value is not None}
        hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        places = torch.arange(attention_mask.shape[1], device=hidden.device)
        last = (attention_mask.to(hidden.device) * places).argmax(1)
        return SequenceClassifierOutput(logits=self.score(hidden[torch.arange(len(hidden), device=hidden.device), last]))


def register_classifier(config: PretrainedConfig) -> None:
    """Make a sequence classifier for a language model's family if there is none.

    Raises:
        RecipeError: for a family whose language model is more than a backbone with a head.
    """
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    causal, backbone = MODEL_FOR_CAUSAL_LM_MAPPING[kind], MODEL_MAPPING.get(kind, None)
    with torch.device("meta"):
        inner = causal(config).base_model
    if type(inner) is not backbone:
        problem = f"{causal.__name__} is not one backbone with a head, so no reward model can be put on it"
        fix = "name a text-only model, or use DPO"
        raise RecipeError(f"model_name_or_path: {config.name_or_path}: {problem}. Fix: {fix}")
    family = next(base for base in causal.__mro__ if base.__name__.endswith("PreTrainedModel"))
    name = causal.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"
    fields = {"base_model_prefix": causal.base_model_prefix, "config_class": kind, "__module__": __name__}
    # Without `exist_ok`, Transformers ignores classes for configurations of its own
    AutoModelForSequenceClassification.register(kind, type(name, (_Classifier, family), fields), exist_ok=True)
