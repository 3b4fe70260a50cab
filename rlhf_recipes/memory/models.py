"""The sizes of a model and of its adapters, from its configuration alone: on the meta device, without weights."""

import copy
import functools
import json
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.hub import explain_load_error, resolve_path
from rlhf_recipes.memory.arithmetic import Shape

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

PARTS = {f"{part}_proj": part for part in ("q", "k", "v", "o", "gate", "up", "down")}
"""The matrices of a layer of Llama's kind, by the last part of their names."""


@dataclass(frozen=True)
class Adapter:
    """What LoRA adds to a base.

    Parameters:
        parameters: its weights, with those of layers that are trained whole besides (`lora_modules_to_save`).
        parts: of a layer, those of `PARTS` that are adapted.
        rank: of LoRA, the largest where layers differ.
        dropout: whether it has dropout.
    """

    parameters: int
    parts: frozenset[str]
    rank: int
    dropout: bool


@dataclass(frozen=True)
class _Held:
    """Passes a value through a cache that goes by another key: it is equal to any."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def load_config(name: str, revision: str = "main", trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model on the Hub or in a folder: a few kilobytes, and no weights.

    Raises:
        RecipeError: if there is none.
    """
    try:
        return AutoConfig.from_pretrained(resolve_path(name), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"model_name_or_path: {name}: its config.json cannot be read (the plan needs no more than that): "
            f"{explain_load_error(name, error)}"
        ) from error


def shape_of(config: PretrainedConfig) -> Shape:
    """The sizes of a model.

    Raises:
        RecipeError: for a model whose layers are not of Llama's kind, as those with experts.
    """
    return _measured(config.to_json_string(use_diff=False), _Held(config))


def adapter_of(config: PretrainedConfig, lora: LoraConfig) -> Adapter:
    """What an adapter adds to a model.

    Raises:
        RecipeError: for layers to adapt that the model has not.
    """
    # All of it: what each option adds is PEFT's business
    whole = json.dumps(lora.to_dict(), sort_keys=True, default=_as_text)
    return _adapted((config.to_json_string(use_diff=False), whole), _Held(config), _Held(lora))


def _as_text(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set) else str(value)


@functools.lru_cache(maxsize=32)
def _adapted(key: tuple, config: _Held, held: _Held) -> Adapter:
    config, lora = config.value, copy.deepcopy(held.value)
    lora.inference_mode = False  # as saved adapters have it, nothing would be trained
    try:
        adapted = get_peft_model(_on_meta(config), lora, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    except ValueError as error:
        raise RecipeError(f"lora_target_modules: {config.name_or_path}: {first_line(error)}") from error
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    names = [name.split(".lora_A")[0] for name, _ in adapted.named_modules() if name.endswith(".lora_A")]
    parts = frozenset(PARTS[last] for name in names if (last := name.rpartition(".")[2]) in PARTS)
    return Adapter(trained, parts, max([lora.r, *lora.rank_pattern.values()]), bool(lora.lora_dropout))


@functools.lru_cache(maxsize=32)
def _measured(text: str, held: _Held) -> Shape:
    config = held.value.get_text_config()
    model = _on_meta(held.value)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    sides = [
        (module.in_features, module.out_features, name.rpartition(".")[2])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    if strange := sorted({name for *_, name in sides} ^ PARTS.keys()):
        raise RecipeError(
            f"model_name_or_path: {held.value.name_or_path}: the plan knows layers as those of Llama, Qwen2, Qwen3 and "
            f"Mistral, and not `{strange[0]}` of {config.model_type}: measure a short run instead (`recipe.json` has its peak)"
        )
    tied = head.weight is embedding.weight
    total, matrices = sum(weight.numel() for weight in model.parameters()), sum(a * b for a, b, _ in sides)
    words = embedding.weight.numel()
    return Shape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        qk_norm=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        matrices=matrices,
        largest=max(a * b for a, b, _ in sides),
        vectors=total - matrices - words * (1 if tied else 2),
        tied=tied,
    )


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, AttributeError) as error:
        where = f"model_name_or_path: {config.name_or_path}"
        raise RecipeError(f"{where}: no causal language model ({first_line(error)})") from error
