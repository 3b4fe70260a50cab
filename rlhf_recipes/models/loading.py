"""The base model, in 4 bits or not, and its tokenizer: the one place where a recipe loads them."""

import contextlib
import copy
import gc
import hashlib
import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line, lack_of_memory
from rlhf_recipes.core.files import RECIPE, read_json
from rlhf_recipes.core.hub import explain_load_error
from rlhf_recipes.core.machine import check_bitsandbytes
from rlhf_recipes.models.kernels import check_kernel_options, compile_layers, without_compilation

import torch
from accelerate.utils import parse_flag_from_env
from jinja2 import TemplateError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_quantization_config
from trl.trainer.base_config import _BaseConfig as TrainingConfig

logger = logging.getLogger(__name__)

_OF_TOKENIZERS = ("eos_token", "chat_template_path", "trust_remote_code")
_PICKLES = ("adapter_model.bin", "pytorch_model.bin")
_OF_ADAPTERS = ("lora_", "trainable_tokens_", ".modules_to_save.")  # in the names of weights that PEFT adds
_DIMENSIONS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

# For tokenizers without a chat template. Plain words, since a new special token would need an embedding, and LoRA trains none;
# single line breaks, which every pretraining text has. EOS stands inside the assistant's turn, so that it is learnt.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['role'].capitalize() + ': ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def resolve_path(name: str) -> str:
    """The folder of a package's data for a dotted path such as `rlhf_recipes.tiny.base`; any other name unchanged."""
    package, *folders = name.split(".")
    if Path(name).exists() or not folders or not all(part.isidentifier() for part in (package, *folders)):
        return name
    try:
        spec = importlib.util.find_spec(package)  # of what is within it, this would run code, and adapters name their base
    except ValueError:  # of `__main__`
        return name
    places = (spec.submodule_search_locations if spec else None) or ()
    return next((str(path) for place in places if (path := Path(place, *folders)).is_dir()), name)


ADAPTER = "adapter_model.safetensors"
"""The weights of an adapter."""


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a file of safetensors, the only format that is read: a pickle may run code.

    Raises:
        RecipeError: if the file is missing or damaged, or a weight is NaN or infinite.
    """
    return dict(each_weight(path))


def each_weight(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The same one after the other, so that a whole model need not be in memory to be looked at.

    Raises:
        RecipeError: as in `read_weights`.
    """
    path = Path(path)
    if not path.is_file():
        pickled = [name for name in _PICKLES if (path.parent / name).exists()]
        remedy = f": {pickled[0]} is a pickle, which is not read: save it as safetensors" if pickled else ""
        raise RecipeError(f"{path.parent}: no {path.name} there{remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                weight = file.get_tensor(name)
                check_finite({name: weight}, path)
                yield name, weight
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{path}: cannot be read ({first_line(error)}): copy or train it again") from error


@torch.no_grad()
def check_finite(weights: Mapping[str, torch.Tensor], where: str | Path, remedy: str = "train it again") -> None:
    """Refuses weights that are NaN or infinite: all that comes of them would be, or look like an answer.

    Raises:
        RecipeError: names the first of them, and the remedy.
    """
    for name, weight in weights.items():
        if not _is_finite(weight):
            raise RecipeError(f"{where}: {name} holds numbers that are not finite (NaN or infinity): {remedy}")


def _is_finite(weight: torch.Tensor) -> bool:
    packed = getattr(weight, "quant_state", None) is not None  # 4 bits, whatever type they are stored as
    if packed or not weight.is_floating_point() or not weight.numel() or weight.is_meta or weight.element_size() == 1:
        return True  # elsewhere, or in 8 bits, of which there is no sum
    # A sum is infinite or NaN where a weight is; where it is only large, one looks again. In parts: a CPU makes fp32 of them
    parts = weight.split(4096) if weight.ndim else [weight]
    return all(part.sum(dtype=torch.float32).isfinite() or part.float().isfinite().all() for part in parts)


def adapter_config(folder: str | Path, where: str = "") -> PeftConfig:
    """The configuration of an adapter, of which every number is one.

    Args:
        folder: of the adapter.
        where: the key that names it, for messages.

    Raises:
        RecipeError: if there is none, or one that no stage writes.
    """
    path = Path(folder) / "adapter_config.json"
    named = f"{where}: {path}" if where else path
    if not path.is_file():
        place = f"{where}: {folder}" if where else folder
        raise RecipeError(f"{place} holds no adapter (no adapter_config.json): train it first, or name another")
    content = read_json(path)
    for key in ("r", "lora_alpha", "lora_dropout"):
        value = content.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise RecipeError(f"{named}: {key}: {value!r} is no number that LoRA can have")
    for key, kind in (("base_model_name_or_path", str), ("task_type", str), ("rank_pattern", dict), ("alpha_pattern", dict)):
        if not isinstance(content.get(key), kind | None):
            raise RecipeError(f"{named}: {key}: {content[key]!r} is not a {kind.__name__}")
    if content.get("megatron_config"):  # which makes PEFT import a module of any name
        raise RecipeError(f"{named}: megatron_config: is not supported")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT looks at some values, and trips over others
        raise RecipeError(f"{named}: {first_line(error)}") from error


def put_adapter(
    model: PreTrainedModel | PeftModel, folder: str | Path, name: str, where: str, trainable: bool = False
) -> PeftModel:
    """The model with a saved adapter on it, of which every weight is in the file, and no other.

    Args:
        model: the base, or with adapters already.
        folder: of the adapter.
        name: of the adapter on the model.
        where: the key that names it, for messages.
        trainable: whether it is to be trained.

    Raises:
        RecipeError: if it cannot be read, or does not fit.
    """
    config, weights = adapter_config(folder, where), read_weights(Path(folder) / ADAPTER)
    check_ranks(config, weights, f"{where}: {folder}")
    with fitting(f"{where}: {folder}", model):
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name, is_trainable=trainable)
        else:
            with warnings.catch_warnings():  # what is missing is said below
                warnings.filterwarnings("ignore", message="Found missing adapter keys")
                model = PeftModel.from_pretrained(model, str(folder), name, is_trainable=trainable)
    check_adapter_complete(model, name, weights, f"{where}: {folder}")
    return model


@contextlib.contextmanager
def fitting(adapter: str, model: torch.nn.Module) -> Iterator[None]:
    """Says of an adapter that PEFT cannot put on a model that it does not fit.

    Raises:
        RecipeError: with what PEFT or PyTorch said. A lack of memory stays what it is.
    """
    try:
        yield
    except Exception as error:  # they have many ways to say so, which configurations that anybody may have edited all find
        if lack_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise RecipeError(f"{adapter} does not fit {base_name(model)}: {reason}") from error


def check_ranks(config: PeftConfig, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuses a rank that the weights have not, before room is made for it.

    Raises:
        RecipeError: with both.
    """
    firsts = ("lora_A", "lora_embedding_A")
    ranks = {weight.shape[0] for name, weight in weights.items() if weight.ndim and any(first in name for first in firsts)}
    named = {getattr(config, "r", None), *(getattr(config, "rank_pattern", None) or {}).values()} - {None}
    for rank in named if ranks else ():
        # an `r` that patterns leave to no layer may be larger than those that there are
        if type(rank) is not int or rank > max(4096, *ranks):
            raise RecipeError(
                f"{where}: does not fit its own weights: adapter_config.json says r {rank}, and they have {max(ranks)}"
            )


def check_adapter_complete(model: PeftModel, name: str, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuses an adapter whose file lacks weights, which would be random, or has others: PEFT warns of the one at the most.

    Raises:
        RecipeError: names the first of them.
    """
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if lacking := sorted(expected.keys() - weights.keys()):
        raise RecipeError(f"{where}: its weights lack {len(lacking)} of the adapter's ({lacking[0]}, ...): train it again")
    # PEFT saves the embeddings and the LM head beside an adapter that stands on them: those are the base's
    bases = (".base_layer.", "embed", "lm_head")
    others = [key for key in weights.keys() - expected.keys() if "lora_" in key or not any(part in key for part in bases)]
    if others:
        raise RecipeError(f"{where}: its weights do not fit {base_name(model)}: {min(others)} has no counterpart")


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
    config = adapter_config(start_from, "start_from") if start_from is not None else None
    model = load_model(arguments, training)
    check_vocabulary(model, tokenizer)
    if config is None:
        return model
    if not arguments.use_peft:
        raise RecipeError(
            f"start_from: {start_from} is an adapter: set `use_peft: true`, or merge it and name the result as model"
        )
    refuse_reward_adapter(f"start_from: {start_from}", config.task_type)
    check_base(f"start_from: {start_from}", config.base_model_name_or_path, read_json(Path(start_from) / RECIPE), model)
    return put_adapter(model, start_from, "default", "start_from", trainable=True)


def refuse_reward_adapter(where: str, task_type: str | None) -> None:
    """Refuses a reward model in the place of a policy: its adapter would load, and speak.

    Raises:
        RecipeError: for the task type of a reward model.
    """
    if task_type == "SEQ_CLS":
        raise RecipeError(f"{where} is a reward model (task_type SEQ_CLS), and no policy: name the adapter of recipes/sft.py")


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer with words that the model has no embedding for.

    Raises:
        RecipeError: with the size of either vocabulary.
    """
    rows = model.get_input_embeddings().num_embeddings  # not those of its weight, of which ZeRO-3 may leave none
    if len(tokenizer) > rows:
        raise RecipeError(
            f"the vocabulary of the tokenizer in {tokenizer.name_or_path} has {len(tokenizer)} words, and {model.name_or_path} "
            f"has embeddings for {rows}: one of the two belongs to another model"
        )


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
    _check_4bit_sides(model, path)
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


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """The model that adapters, if there are any, stand on."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model: torch.nn.Module) -> torch.nn.Module:
    """The model below its head: tokens to hidden states; of a model without a head, that itself."""
    return base_of(model).base_model


def forward_backbone(model: torch.nn.Module, **inputs: Any) -> Any:
    """What the trunk makes of the inputs (Transformers' outputs, with `last_hidden_state`).

    FSDP gathers the weights that belong to no layer (embeddings, last norm) when its root is called: a trunk that is called
    past it would compute with a share of them.
    """
    if not isinstance(model, FSDPModule):
        return backbone(model)(**inputs)
    if not hasattr(model, "_forward_backbone"):
        model._forward_backbone = lambda **inputs: backbone(model)(**inputs)
        register_fsdp_forward_method(model, "_forward_backbone")
    return model._forward_backbone(**inputs)


def base_name(model: torch.nn.Module) -> str:
    """The Hub name or folder of a model's base."""
    return base_of(model).name_or_path or type(base_of(model)).__name__


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """What tells a base from others: its dimensions, and digests of its weights, rounded to bf16.

    `weights` covers what quantisation leaves alone, the embeddings and all vectors (norms and biases); `matrices` the rest,
    which is all that merging LoRA changes. Each is the same for a base in fp32 and bf16, as a language model and as a
    classifier, with adapters or without, and None where it cannot be had: both in fp16, where weights are spread over
    devices, and under ZeRO-3, `matrices` in 4 and 8 bits too. The LM head is in neither, since a classifier has none.
    """
    config = base_of(model).config.get_text_config()
    dimensions = {name: getattr(config, name) for name in _DIMENSIONS if getattr(config, name, None) is not None}
    if is_deepspeed_zero3_enabled():
        return {"dimensions": dimensions, "weights": None, "matrices": None}
    weights, matrices = _by_sort(backbone(model))
    return {"dimensions": dimensions, "weights": _digest(weights), "matrices": _digest(matrices)}


def _by_sort(trunk: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of the base that are never quantised, and those that may be, without what adapters add."""
    embedding = trunk.get_input_embeddings()
    if isinstance(embedding, AuxiliaryTrainingWrapper):
        embedding = embedding.original_module
    if isinstance(embedding, BaseTunerLayer):
        embedding = embedding.get_base_layer()
    weights, matrices = {"embedding": embedding.weight}, {}
    for name, weight in trunk.named_parameters():
        if weight is not embedding.weight and not any(part in name for part in _OF_ADAPTERS):
            sort = weights if weight.ndim == 1 else matrices
            sort[name.replace("base_layer.", "").replace("original_module.", "")] = weight
    return weights, matrices


def _digest(weights: dict[str, torch.Tensor]) -> str | None:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        packed = getattr(weight, "quant_state", None) is not None  # 4 bits, whatever type they are stored as
        if packed or weight.dtype not in (torch.float32, torch.bfloat16) or weight.is_meta or not weight.numel():
            return None
        bits = weight.detach().to(torch.bfloat16).reshape(-1, weight.shape[-1]).view(torch.int16)
        digest.update(name.encode())
        digest.update(bits.sum(0, dtype=torch.int64).cpu().numpy().tobytes())  # a sum of columns: all of it, in little time
    return digest.hexdigest()


def check_base(where: str | Path, trained_on: str | None, record: dict[str, Any], model: torch.nn.Module) -> None:
    """Refuses a base on which an adapter was not trained.

    By the fingerprint where the record has one, since a base may be moved and renamed. Where no weights can be compared the
    name decides; where the linear layers cannot, another name is warned of: a base that an adapter was merged into keeps its
    embeddings.

    Args:
        where: the folder of the adapter, for messages.
        trained_on: the base that the adapter's configuration names.
        record: what `reward.json` or `recipe.json` beside it holds.
        model: the base in memory.

    Raises:
        RecipeError: names both bases, and says in what they differ.
    """
    known, here, name = (record.get("base_model") or {}).get("fingerprint") or {}, fingerprint(model), base_name(model)
    if differences := _differences(known, here):
        raise RecipeError(
            f"{where} was trained on {trained_on}, and the base in memory, {name}, is another: {', '.join(differences)}; name "
            "the one that it was trained on, or train it on this one"
        )
    compared = [part for part in ("weights", "matrices") if known.get(part) and here[part]]
    if len(compared) == 2 or same_name(trained_on, name):
        return
    message = f"{where} was trained on {trained_on}, and the base in memory is {name}"
    if not compared:
        raise RecipeError(
            f"{message}: their weights cannot be compared, so their names must agree: name the base that it was trained on "
            "(one that was moved is known again by its weights, in float32 or bfloat16)"
        )
    logger.warning(
        "%s: their embeddings are the same, and their linear layers cannot be compared (quantised now or then, or not "
        "recorded): if an adapter was merged into one of them, name the other, or what comes out is wrong",
        message,
    )


def _differences(known: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """In what two fingerprints differ, as far as both say something."""
    dimensions = known.get("dimensions") or {}
    differences = [
        f"{name} {dimensions.get(name)} against {value}"
        for name, value in here["dimensions"].items()
        if dimensions and dimensions.get(name) != value
    ]
    if not differences:
        both = {part for part in ("weights", "matrices") if known.get(part) and here[part] and known[part] != here[part]}
        differences = ["other weights" if "weights" in both else "other weights in the linear layers"] if both else []
    return differences


def same_name(one: str | None, other: str | None) -> bool:
    """Whether two names of a base may mean one: a Hub name, and the same model in a folder of its name."""
    return bool(one and other) and Path(one).name == Path(other).name


def disable_cpu_4bit_repacking(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    Version 0.50 does so in place at the first forward pass in eval mode; afterwards the layer passes no gradient on, silently:
    training goes wrong after its first evaluation or rollout. See `tests/test_models.py`.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def preserve_param_dtypes(model: torch.nn.Module) -> Iterator[None]:
    """Undoes what happens within to the types of weights: TRL's trainers cast what is trainable on a quantised base to bf16.

    A rounded policy would differ from its reference, which is frozen and not rounded. Weights that are new afterwards, as those
    of an adapter that the trainer made itself, are left to `keep_adapter_in_fp32`.
    """
    before = {name: weight.data for name, weight in model.named_parameters()}
    yield
    for name, weight in model.named_parameters():
        if name in before and weight.dtype != before[name].dtype:
            weight.data = before[name].to(weight.device)


def keep_adapter_in_fp32(trainer: Trainer) -> None:
    """Undoes the cast to bf16 that TRL's trainers give to an adapter that they make themselves on a quantised base.

    What was there keeps its values by `preserve_param_dtypes`, however it is launched; these are fresh, and need only the
    type. AdamW's steps are often too small for bf16 to represent, and PEFT loads an adapter in fp32: a run resumed from a
    checkpoint would go on in another type than it began in. It costs two bytes more a weight of the adapter, and two or four
    in the optimizer. Call it between the trainer's construction and `train()`; it does nothing to models that are not
    quantised, nor under FSDP and DeepSpeed, which want one type for all that they gather.
    """
    model = trainer.model
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    fsdp = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if not quantised or trainer.is_deepspeed_enabled or (fsdp and fsdp.fsdp_version == 1):
        return
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def load_tokenizer(arguments: ModelConfig, *groups: Any, start_from: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model, with a chat template, and an EOS that ends a turn and is not PAD.

    `eos_token` and `chat_template_path` of `groups` are honoured. Without a template of its own the tokenizer gets
    `PLAIN_CHAT_TEMPLATE`.

    Args:
        arguments: as in `load_model`.
        groups: the recipe's other arguments, of which some have `eos_token`, `chat_template_path` and `trust_remote_code`.
        start_from: the folder of an earlier stage, whose tokenizer, with the template and the EOS that the policy was taught,
            is taken where there is one.

    Raises:
        RecipeError: if there is no tokenizer, a token is not in its vocabulary, or its template never ends a turn by EOS.
    """
    taught = start_from is not None and (Path(start_from) / "tokenizer_config.json").is_file()
    path = str(start_from) if taught else model_path(arguments)
    options = {name: value for group in groups for name in _OF_TOKENIZERS if (value := getattr(group, name, None))}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision="main" if taught else arguments.model_revision,
            trust_remote_code=options.get("trust_remote_code", False),
        )
        _set_eos(tokenizer, options.get("eos_token"))
        _set_pad(tokenizer)
        _set_chat_template(tokenizer, options.get("chat_template_path"))
        _check_turn_ends(tokenizer)
    except RecipeError:
        raise
    except Exception as error:  # the tokenizers' own is nothing more
        reason = explain_load_error(path, error)
        if Path(path).is_dir():
            reason = f"no usable tokenizer there ({reason}); the folder needs tokenizer.json and tokenizer_config.json"
        raise RecipeError(f"model_name_or_path: {path}: {reason}") from error
    return tokenizer


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


def _check_4bit_sides(model: torch.nn.Module, path: str) -> None:
    if model.device.type != "cpu":
        return
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and (module.in_features % 32 or module.out_features % 32):
            sides = f"{module.in_features} x {module.out_features}"
            raise RecipeError(
                f"load_in_4bit: {path}: {name} is {sides}, and on a CPU bitsandbytes needs sides that are multiples of 32"
            )


def _set_eos(tokenizer: PreTrainedTokenizerBase, eos_token: str | None) -> None:
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            own = f", whose own is '{tokenizer.eos_token}': leave the key out for that one" if tokenizer.eos_token else ""
            raise RecipeError(f"eos_token: '{eos_token}' is not in the vocabulary of {tokenizer.name_or_path}{own}")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token is None:
        raise RecipeError(f"{tokenizer.name_or_path} has no EOS, so answers would never end: set `eos_token`")


def _set_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Keeps PAD, or picks one that is not EOS: a model for which they are one cannot be seen to stop."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    # No text ever holds these, so their embeddings need not be trained; a new token would need a larger embedding matrix.
    special = [token for token in tokenizer.get_added_vocab() if token not in tokenizer.all_special_tokens]
    spare = [token for word in ("pad", "reserved", "unused") for token in special if word in token.lower()]
    # The last of the vocabulary is a rare word: where it stands in a text it is not masked, for masks go by length.
    last = max(set(tokenizer.get_vocab()) - {tokenizer.eos_token}, key=tokenizer.get_vocab().get)
    candidates = [*spare, tokenizer.unk_token, tokenizer.bos_token, last]
    tokenizer.pad_token = next(token for token in candidates if token not in (None, tokenizer.eos_token))
    logger.warning("%s has no PAD besides its EOS: '%s' serves as PAD", tokenizer.name_or_path, tokenizer.pad_token)


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    if path is None:
        if tokenizer.chat_template is None:
            logger.warning("%s has no chat template: one of plain words is added", tokenizer.name_or_path)
            tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        return
    if Path(path).suffix in (".jinja", ".j2"):
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"chat_template_path: {path}: cannot be read ({first_line(error)})") from error
        return
    try:
        source = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as in `load_tokenizer`
        reason = explain_load_error(path, error)
        raise RecipeError(f"chat_template_path: {path}: neither a .jinja file nor a tokenizer: {reason}") from error
    if source.chat_template is None:
        raise RecipeError(f"chat_template_path: the tokenizer {path} has no chat template")
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in source.get_added_vocab() if t in source.chat_template and t not in vocabulary]
    if missing:
        raise RecipeError(
            f"chat_template_path: the template of {path} uses {', '.join(missing)}, which {tokenizer.name_or_path} does not "
            "know. New tokens need trained embeddings, which LoRA leaves alone: leave `chat_template_path` out for a template "
            "of plain words, or write one in a .jinja file"
        )
    tokenizer.chat_template = source.chat_template


def _check_turn_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a template whose assistant turns do not end by EOS: the model would never learn to stop."""
    answer = "answer"
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:  # a program's
        raise RecipeError(f"the chat template of {tokenizer.name_or_path} is not valid: {first_line(error)}") from error
    if answer not in text:
        raise RecipeError(
            f"the chat template of {tokenizer.name_or_path} leaves out what the assistant says: set `chat_template_path`"
        )
    end = text[text.rindex(answer) + len(answer) :]
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id not in ids:
        ends = [token for token in tokenizer.get_added_vocab() if token in end]
        remedy = f"set `eos_token: '{ends[0]}'`" if ends else "put `eos_token` after the assistant's content in the template"
        raise RecipeError(
            f"the chat template of {tokenizer.name_or_path} ends an answer by {end!r}, and its EOS is '{tokenizer.eos_token}': "
            f"the model would never learn to stop; {remedy}"
        )
