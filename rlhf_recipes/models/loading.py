"""Load base models, and policies that start from a saved adapter."""

import gc
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, error_context, first_line
from rlhf_recipes.core.files import ADAPTER, RECIPE, read_json
from rlhf_recipes.core.hub import explain_load_error
from rlhf_recipes.core.machine import check_bitsandbytes
from rlhf_recipes.inputs import check_model
from rlhf_recipes.models.adapters import add_adapter, check_policy_adapter, read_adapter_config
from rlhf_recipes.models.architectures import register_classifier
from rlhf_recipes.models.fingerprint import check_base
from rlhf_recipes.models.kernels import check_kernel_options, compile_layers, without_compilation
from rlhf_recipes.models.lm_head import keep_head_inputs_contiguous
from rlhf_recipes.models.precision import check_4bit_shapes, check_quantised_share, disable_cpu_4bit_repacking
from rlhf_recipes.models.weights import check_finite, read_weights

import torch
from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_quantization_config
from trl.trainer.base_config import _BaseConfig as TrainingConfig


def model_path(arguments: ModelConfig) -> str:
    """Return the Hub name or local folder of the base model.

    Raises:
        RecipeError: if none is named, or the folder is missing or holds an adapter.
    """
    name = arguments.model_name_or_path
    if not name:
        raise RecipeError("model_name_or_path: is not set. Fix: name the base model, by Hub name or local folder")
    with error_context("model_name_or_path"):
        return check_model(os.path.expanduser(name))


def load_model(arguments: ModelConfig, training: TrainingConfig) -> PreTrainedModel:
    """Load the base model, in its number type or in 4 or 8 bits.

    Args:
        arguments: TRL's model arguments; the LoRA arguments are not used.
        training: for `model_init_kwargs`, `trust_remote_code` and the device.

    Raises:
        RecipeError: if there is no such model, it cannot be reached, it is an adapter, or its files lack weights.
    """
    model, missing = load_architecture(AutoModelForCausalLM, arguments, training)
    if missing:
        raise RecipeError(
            f"model_name_or_path: {model_path(arguments)}: {len(missing)} weights are missing in its files "
            f"({', '.join(sorted(missing)[:3])}) and would be random. Fix: name a complete causal language model"
        )
    keep_head_inputs_contiguous(model)
    return model


def load_policy(
    arguments: ModelConfig, training: TrainingConfig, start_from: str | Path | None, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | PeftModel:
    """Load the base model, with the adapter in `start_from` on it, trainable.

    Raises:
        RecipeError: as in `load_model`; if there is no such adapter, or it was trained on another base; if the base lacks
            embeddings for some tokens.
    """
    where = f"start_from: {start_from}"
    config = read_adapter_config(start_from, "start_from") if start_from is not None else None
    model = load_model(arguments, training)
    check_vocabulary(model, tokenizer)
    if config is None:
        return model
    if not arguments.use_peft:
        raise RecipeError(f"{where} is an adapter. Fix: set `use_peft: true`, or merge it and name the result as model")
    check_policy_adapter(where, config.task_type)
    check_base(where, config.base_model_name_or_path, read_json(Path(start_from) / RECIPE), model)
    return add_adapter(model, config, read_weights(Path(start_from) / ADAPTER), "default", where, trainable=True)


def load_architecture(
    architecture: type, arguments: ModelConfig, training: TrainingConfig, **options: Any
) -> tuple[PreTrainedModel, set[str]]:
    """Load the base as one of Transformers' `AutoModelFor...` classes.

    Args:
        architecture: the class.
        arguments: as in `load_model`.
        training: as in `load_model`.
        options: further arguments of `from_pretrained`.

    Returns:
        The model, and the names of weights that its files lack, which are random.

    Raises:
        RecipeError: as in `load_model`.
    """
    path = model_path(arguments)
    check_kernel_options(arguments, training)
    revision = {"revision": arguments.model_revision, "trust_remote_code": getattr(training, "trust_remote_code", False)}
    try:
        config = AutoConfig.from_pretrained(path, **revision)
        if architecture is AutoModelForSequenceClassification:
            register_classifier(config)
        quantization = _quantization(arguments, config)
        quantised = bool(quantization or getattr(config, "quantization_config", None))  # by us, or in its files
        if quantised and is_deepspeed_zero3_enabled():
            raise RecipeError("DeepSpeed ZeRO-3 cannot shard quantised weights. Fix: use configs/accelerate/fsdp.yaml")
        check_bitsandbytes(quantised, training)
        settings = {
            "dtype": arguments.dtype or "auto",
            "attn_implementation": arguments.attn_implementation,
            **({"quantization_config": quantization} if quantization else {}),  # None would override that of the files
            **({"device_map": {"": training.device}} if quantised else {}),  # else bitsandbytes chooses a device
            **revision,
            **options,
            **(getattr(training, "model_init_kwargs", None) or {}),
        }
        # safetensors only: never a pickle
        model, loading = architecture.from_pretrained(path, **settings, use_safetensors=True, output_loading_info=True)
    except RecipeError:
        raise
    except Exception as error:  # a wrong config.json, wrong weights and the Hub raise any of them
        if arguments.attn_implementation and re.search("attn_implementation|flash.?attention", str(error), re.IGNORECASE):
            raise RecipeError(
                f"attn_implementation: {arguments.attn_implementation}: {first_line(error)} Fix: leave the key out for "
                "PyTorch's attention"
            ) from error
        raise RecipeError(f"model_name_or_path: {path}: {explain_load_error(path, error)}") from error
    check_finite(dict(model.named_parameters()), f"model_name_or_path: {path}", "copy or download it again")
    check_4bit_shapes(model, path)
    if quantization:
        check_quantised_share(model, "load_in_4bit" if arguments.load_in_4bit else "load_in_8bit", path)
    disable_cpu_4bit_repacking(model)
    compile_layers(model, training)
    return model, set(loading["missing_keys"])


def _quantization(arguments: ModelConfig, config: PretrainedConfig) -> BitsAndBytesConfig | None:
    """Return TRL's quantisation; "auto" computes in the type of the stored weights."""
    if arguments.dtype in (None, "auto"):
        arguments = replace(arguments, dtype=str(config.dtype or torch.float32).removeprefix("torch."))
    if arguments.bnb_4bit_quant_storage is None and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        arguments = replace(arguments, bnb_4bit_quant_storage="bfloat16")  # FSDP shards floats only
    return get_quantization_config(arguments)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings.

    Raises:
        RecipeError: with both numbers.
    """
    rows = model.get_input_embeddings().num_embeddings  # under ZeRO-3 the weight itself may be empty
    if len(tokenizer) > rows:
        raise RecipeError(
            f"the vocabulary of the tokenizer in {tokenizer.name_or_path} has {len(tokenizer)} tokens, and "
            f"{model.name_or_path} has embeddings for {rows}. Fix: name a model and a tokenizer that belong together"
        )


def strip_consumed_arguments(training: TrainingConfig) -> TrainingConfig:
    """Return a copy for the trainer, without arguments that are applied elsewhere.

    `load_model` applies `model_init_kwargs`, `load_tokenizer` the chat template, and `publish` uploads the finished result,
    where the trainer would upload every checkpoint. `recipe.json` records the original.
    """
    rest = without_compilation(training)
    rest.model_init_kwargs = rest.chat_template_path = None
    rest.push_to_hub = False
    return rest


def release_memory() -> None:
    """Free the memory of unused objects; a trainer and its model refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
