"""The base model, in 4 bits or not, and its tokenizer: the one place where a recipe loads them."""

import copy
import gc
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.files import RECIPE, read_json
from rlhf_recipes.core.hub import explain_load_error, resolve_path
from rlhf_recipes.core.machine import check_bitsandbytes
from rlhf_recipes.models.adapters import check_policy_adapter, load_adapter, read_adapter_config
from rlhf_recipes.models.compatibility import check_base, check_vocabulary
from rlhf_recipes.models.kernels import check_kernel_options, compile_layers, without_compilation
from rlhf_recipes.models.precision import check_4bit_shapes, disable_cpu_4bit_repacking
from rlhf_recipes.models.weights import check_finite

import torch
from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_quantization_config
from trl.trainer.base_config import _BaseConfig as TrainingConfig

logger = logging.getLogger(__name__)


def load_model(arguments: ModelConfig, training: TrainingConfig) -> PreTrainedModel:
    """The base model that `model_name_or_path` names, in the type or the 4 or 8 bits that `arguments` ask for.

    Args:
        arguments: TRL's model arguments; the LoRA ones are not used here.
        training: for `model_init_kwargs` and `trust_remote_code`.

    Raises:
        RecipeError: if there is no model of that name, it cannot be reached, it is an adapter, or its files lack weights.
    """
    model, missing = load_architecture(AutoModelForCausalLM, arguments, training)
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise RecipeError(
            f"model_name_or_path: {model_path(arguments)}: its files lack {len(missing)} of the weights ({names}, ...), which "
            "would be random: name a whole causal language model"
        )
    return model


def load_policy(
    arguments: ModelConfig, training: TrainingConfig, start_from: str | Path | None, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | PeftModel:
    """The base model, with the adapter in `start_from` on it, trainable, where one is named.

    Args:
        arguments: as in `load_model`.
        training: as in `load_model`.
        start_from: the folder of an adapter that an earlier stage saved.
        tokenizer: of the run.

    Raises:
        RecipeError: as in `load_model`; if there is no such adapter, or it was trained on another base; if the base has no
            embedding for some of the tokenizer's words.
    """
    config = read_adapter_config(start_from, "start_from") if start_from is not None else None
    model = load_model(arguments, training)
    check_vocabulary(model, tokenizer)
    if config is None:
        return model
    if not arguments.use_peft:
        raise RecipeError(
            f"start_from: {start_from} is an adapter: set `use_peft: true`, or merge it and name the result as model"
        )
    check_policy_adapter(f"start_from: {start_from}", config.task_type)
    check_base(f"start_from: {start_from}", config.base_model_name_or_path, read_json(Path(start_from) / RECIPE), model)
    return load_adapter(model, start_from, "default", "start_from", trainable=True)


def load_architecture(
    architecture: type, arguments: ModelConfig, training: TrainingConfig, **options: Any
) -> tuple[PreTrainedModel, set[str]]:
    """The base model as one of Transformers' `AutoModelFor...`, and the names of weights that its files lack (they are random).

    Args:
        architecture: the class to load with.
        arguments: as in `load_model`.
        training: as in `load_model`.
        options: more of `from_pretrained`'s arguments.

    Raises:
        RecipeError: as in `load_model`.
    """
    path = model_path(arguments)
    check_kernel_options(arguments, training)
    revision = {"revision": arguments.model_revision, "trust_remote_code": getattr(training, "trust_remote_code", False)}
    try:
        config = AutoConfig.from_pretrained(path, **revision)
        quantization = _quantization(arguments, config)
        in_few_bits = quantization or getattr(config, "quantization_config", None)  # by us, or as it is stored
        if in_few_bits and is_deepspeed_zero3_enabled():  # that a base is stored so is seen here only
            raise RecipeError("DeepSpeed ZeRO-3 cannot share out weights in few bits: use configs/accelerate/fsdp.yaml")
        check_bitsandbytes(bool(in_few_bits), training)
        placed = {"device_map": {"": training.device}} if in_few_bits else {}  # not where bitsandbytes thinks best
        settings = {
            "dtype": arguments.dtype or "auto",
            "attn_implementation": arguments.attn_implementation,
            **({"quantization_config": quantization} if quantization else {}),  # None would deny that of the files
            **placed,
            **revision,
            **options,
            **(getattr(training, "model_init_kwargs", None) or {}),
        }
        # safetensors only: never a pickle
        model, loading = architecture.from_pretrained(path, **settings, use_safetensors=True, output_loading_info=True)
    except RecipeError:
        raise
    except Exception as error:  # what is wrong with a config.json, weights or the Hub comes as any of them
        if arguments.attn_implementation and re.search("attn_implementation|flash.?attention", str(error), re.IGNORECASE):
            raise RecipeError(
                f"attn_implementation: {arguments.attn_implementation}: {first_line(error)} Leave the key out for PyTorch's "
                "own attention"
            ) from error
        raise RecipeError(f"model_name_or_path: {path}: {explain_load_error(path, error)}") from error
    check_finite(dict(model.named_parameters()), f"model_name_or_path: {path}", "copy or download it again")
    check_4bit_shapes(model, path)
    disable_cpu_4bit_repacking(model)
    compile_layers(model, training)
    return model, set(loading["missing_keys"])


def model_path(arguments: ModelConfig) -> str:
    """The Hub name or local folder of the base model.

    Raises:
        RecipeError: if none is named, or a folder is named that is not there or holds an adapter.
    """
    name = arguments.model_name_or_path
    if not name:
        raise RecipeError("model_name_or_path: name the base model: a Hub name or a local folder")
    path = resolve_path(os.path.expanduser(name))
    if (Path(path) / "adapter_config.json").exists():
        raise RecipeError(
            f"model_name_or_path: {path} holds an adapter, not a model: name its base here (to go on with an unfinished run, "
            "set `resume_from_checkpoint: true`)"
        )
    looks_local = path.startswith((".", "/")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise RecipeError(f"model_name_or_path: {path}: no such folder")
    return path


def release_memory() -> None:
    """Gives back the memory of what nobody holds; a trainer and its model refer to each other, and would stay for a while."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def strip_consumed_arguments(training: TrainingConfig) -> TrainingConfig:
    """The arguments for the trainer: a copy without those that are honoured elsewhere. The original goes into `recipe.json`.

    The trainer would warn of what `load_model` has read, and clone the template of `load_tokenizer` once more. And it would
    upload at every checkpoint, for which it writes what is half trained over an earlier result: `publish` does so in the end.
    """
    rest = copy.copy(without_compilation(training))
    rest.model_init_kwargs = rest.chat_template_path = None
    rest.push_to_hub = False
    return rest


def _quantization(arguments: ModelConfig, config: PretrainedConfig) -> BitsAndBytesConfig | None:
    """As TRL has it, which computes in the type named by `dtype`; of the types, "auto" is that of the stored weights."""
    if arguments.dtype in (None, "auto"):
        arguments = replace(arguments, dtype=str(config.dtype or torch.float32).removeprefix("torch."))
    if arguments.bnb_4bit_quant_storage is None and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # FSDP gives each process its share of floats only: bytes it would leave whole in all of them. The 4 bits are the same
        arguments = replace(arguments, bnb_4bit_quant_storage="bfloat16")
    return get_quantization_config(arguments)
