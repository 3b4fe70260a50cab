"""Sizes of a model and its adapters, from `config.json` on PyTorch's meta device."""

import copy
import json
from dataclasses import dataclass

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.hub import explain_load_error, resolve_path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

PARTS = {f"{part}_proj": part for part in ("q", "k", "v", "o", "gate", "up", "down")}
"""The linear layers of a decoder layer like Llama's, by the last part of their names."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a language model with layers like Llama's.

    Parameters:
        qk_norm: whether queries and keys are normalised, as in Qwen3.
        matrices: weights of all linear layers but the LM head: what bitsandbytes quantises.
        largest: weights of the largest of them.
        vectors: the other weights of the decoder: norms and biases.
        tied: whether the LM head is the embedding.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    qk_norm: bool
    matrices: int
    largest: int
    vectors: int
    tied: bool

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and of an LM head that is not tied to it."""
        return self.vocabulary * self.hidden

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys of a token, and of all values."""
        return self.kv_heads * self.head_dim

    def parameters(self, head: bool = True) -> int:
        """Return the number of weights; a tied LM head counts once."""
        return self.matrices + self.vectors + self.embedding * (1 if self.tied or not head else 2)


@dataclass(frozen=True)
class AdapterShape:
    """What LoRA adds to a base.

    Parameters:
        parameters: its weights, with the layers that are trained in full (`lora_modules_to_save`).
        parts: the values of `PARTS` that are adapted.
        rank: the largest where layers differ.
    """

    parameters: int
    parts: frozenset[str]
    rank: int
    dropout: bool


# By the text of their configurations: a pipeline asks for the same model hundreds of times
_SHAPES: dict[str, ModelShape] = {}
_ADAPTERS: dict[tuple[str, str], AdapterShape] = {}


def load_config(name: str, revision: str = "main", trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the configuration of a model on the Hub or in a folder."""
    try:
        return AutoConfig.from_pretrained(resolve_path(name), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = explain_load_error(name, error)
        raise RecipeError(f"model_name_or_path: {name}: cannot read config.json, which the plan needs: {reason}") from error


def measure_shape(config: PretrainedConfig) -> ModelShape:
    """Return the sizes of a model.

    Raises:
        RecipeError: for layers unlike Llama's, such as mixtures of experts.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _SHAPES:
        _SHAPES[key] = _count_model(config)
    return _SHAPES[key]


def measure_adapter(config: PretrainedConfig, lora: LoraConfig) -> AdapterShape:
    """Return what an adapter adds to a model.

    Raises:
        RecipeError: if the model has none of the layers to adapt.
    """
    # All options: PEFT alone knows what each of them adds
    options = {name: sorted(value, key=str) if isinstance(value, set) else value for name, value in lora.to_dict().items()}
    key = (config.to_json_string(use_diff=False), json.dumps(options, sort_keys=True, default=str))
    if key not in _ADAPTERS:
        _ADAPTERS[key] = _count_adapter(config, lora)
    return _ADAPTERS[key]


def _count_adapter(config: PretrainedConfig, lora: LoraConfig) -> AdapterShape:
    lora = copy.deepcopy(lora)
    lora.inference_mode = False  # saved adapters set it, and then PEFT freezes every weight
    try:
        model = get_peft_model(_on_meta(config), lora, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    except ValueError as error:
        raise RecipeError(f"lora_target_modules: {config.name_or_path}: {first_line(error)}") from error
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    names = [name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith(".lora_A")]
    parts = frozenset(PARTS[last] for name in names if (last := name.rpartition(".")[2]) in PARTS)
    return AdapterShape(trained, parts, max([lora.r, *lora.rank_pattern.values()]), bool(lora.lora_dropout))


def _count_model(config: PretrainedConfig) -> ModelShape:
    model, text_config = _on_meta(config), config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear = {
        name: module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if unknown := sorted({name.rpartition(".")[2] for name in linear} ^ PARTS.keys()):
        raise RecipeError(
            f"model_name_or_path: {config.name_or_path}: the plan knows layers like those of Llama, Qwen2, Qwen3 and Mistral, "
            f"not `{unknown[0]}` of {text_config.model_type}. Fix: run a few steps; `recipe.json` has their peak"
        )
    tied = head.weight is embedding.weight
    total, matrices = sum(weight.numel() for weight in model.parameters()), sum(linear.values())
    return ModelShape(
        hidden=text_config.hidden_size,
        intermediate=text_config.intermediate_size,
        layers=text_config.num_hidden_layers,
        heads=text_config.num_attention_heads,
        kv_heads=text_config.num_key_value_heads,
        head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads,
        vocabulary=text_config.vocab_size,
        qk_norm=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        matrices=matrices,
        largest=max(linear.values()),
        vectors=total - matrices - embedding.weight.numel() * (1 if tied else 2),
        tied=tied,
    )


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, AttributeError) as error:
        raise RecipeError(
            f"model_name_or_path: {config.name_or_path}: not a causal language model ({first_line(error)})"
        ) from error
