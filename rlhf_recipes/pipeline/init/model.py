"""What a model's config.json and tokenizer say that its pipeline depends on."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.memory.model_shape import load_config, measure_shape
from rlhf_recipes.models.loading import model_path
from rlhf_recipes.models.positions import position_limit
from rlhf_recipes.models.tokenizer import PLAIN_CHAT_TEMPLATE, load_tokenizer

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Tokens that end texts or turns in common families."""


@dataclass(frozen=True)
class Model:
    """A model that a pipeline is written for.

    Parameters:
        name: on the Hub, or its folder.
        tokenizer: as the stages use it.
        eos_token: the value that `eos_token` needs, or None if the tokenizer's own is right.
        context: tokens that it was made for, or None.
        has_plan: whether its memory can be predicted.
        has_template: whether it brings a chat template.
        findings: what is worth knowing, a sentence each.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    eos_token: str | None
    context: int | None
    has_plan: bool
    has_template: bool
    findings: list[str]

    def count_tokens(self, value: Any) -> int:
        """Return the tokens of a text or of a list of messages."""
        if not isinstance(value, str):
            value = self.tokenizer.apply_chat_template(value, tokenize=False)
        return len(self.tokenizer(value)["input_ids"])


def inspect_model(name: str) -> Model:
    """Read the config.json and the tokenizer of a model, and none of its weights.

    Raises:
        RecipeError: if one of them is missing or cannot be reached, or no token can be EOS.
    """
    arguments = ModelConfig(model_name_or_path=name)
    config = load_config(model_path(arguments)).get_text_config()
    tokenizer, eos_token = _load_tokenizer(arguments)
    context = getattr(config, "max_position_embeddings", None)
    try:
        size = f"{_readable(measure_shape(config).parameters(True))} parameters, "
    except RecipeError:  # layers unlike those of Llama
        size = ""
    own = AutoTokenizer.from_pretrained(model_path(arguments), trust_remote_code=False)
    findings = [f"{config.model_type}, {size}context of {context or 'unknown length'} tokens"]
    if position_limit(arguments):
        findings[0] += ", beyond which it has no positions"
    if not size:
        findings.append("recipes/plan.py cannot predict the memory of its layers, so `gpu_memory` is left out")
    has_template = tokenizer.chat_template != PLAIN_CHAT_TEMPLATE
    if not has_template:
        findings.append("no chat template: messages are written as 'User: ...' and 'Assistant: ...'; plain prompts as they are")
    else:
        findings.append("it has a chat template")
    if own.eos_token is None:
        findings.append(f"its tokenizer names no EOS: `eos_token` is set to {tokenizer.eos_token}")
    elif eos_token:
        findings.append(f"its template ends turns with {eos_token} and not with {own.eos_token}: `eos_token` is set to it")
    else:
        findings.append(f"answers end with {tokenizer.eos_token}")
    if own.pad_token in (None, tokenizer.eos_token):
        findings.append(f"no PAD other than EOS: {tokenizer.pad_token} is used")
    return Model(name, tokenizer, eos_token, context, bool(size), has_template, findings)


def _load_tokenizer(arguments: ModelConfig) -> tuple[PreTrainedTokenizerBase, str | None]:
    """Return the tokenizer, and the EOS that had to be chosen for it."""
    try:
        return load_tokenizer(arguments), None
    except RecipeError as error:
        if "EOS" not in str(error) and "eos_token" not in str(error):
            raise
        for token in _ENDS:
            try:
                return load_tokenizer(arguments, SimpleNamespace(eos_token=token)), token
            except RecipeError:
                continue
        raise


def _readable(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,}"
