"""Load the reward models that `recipes/reward.py` saved."""

import logging
import warnings
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.files import REWARD, read_json
from rlhf_recipes.models.adapters import check_ranks, fitting, read_adapter_config
from rlhf_recipes.models.backbone import backbone, base_name, base_of
from rlhf_recipes.models.compatibility import check_base, check_tokenizer
from rlhf_recipes.models.precision import disable_cpu_4bit_repacking
from rlhf_recipes.models.roles import restore_adapter_state
from rlhf_recipes.models.weights import ADAPTER, check_finite, read_weights
from rlhf_recipes.rewards.reward_json import read_ensemble, read_normalisation
from rlhf_recipes.rewards.reward_models import HEAD, Ensemble, RewardModel, ScalarHead, Scorer

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from peft.functional import cast_adapter_dtype, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

logger = logging.getLogger(__name__)
PREFIX = "base_model.model."
"""PEFT's, of the names of saved weights."""
_HEAD_NAMES = {"score", "classifier"}  # PEFT lists both for every sequence classifier


def load_reward_adapter(
    model: PreTrainedModel | PeftModel,
    folder: str | Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
) -> RewardModel:
    """Puts a saved reward adapter on a base that is in memory, beside the adapters that are there, and frozen.

    Which adapters are active and what is trained stays as it is; the global random state too.

    Args:
        model: the base as a language model, with or without adapters.
        folder: what `recipes/reward.py` saved.
        name: the adapter's name on this model.
        tokenizer: the policy's.
        batch_size: completions a forward pass, when called as a reward function.

    Raises:
        RecipeError: if the folder holds no reward adapter with a head, or one that was trained on another base or with another
            tokenizer or chat template; or if `name` is taken.
    """
    folder = Path(folder)
    config = _adapter_config(folder)
    weights, head = _adapter_weights(folder)
    check_ranks(config, weights, str(folder))
    record = read_json(folder / REWARD)
    check_base(folder, config.base_model_name_or_path, record, model)
    check_tokenizer(folder, tokenizer)
    if name in getattr(model, "peft_config", {}):
        raise RecipeError(f"{folder}: the model has an adapter '{name}' already: give this one another name")
    normalisation = read_normalisation(record, folder)
    with torch.random.fork_rng(devices=[]):  # new weights are drawn at random before they are overwritten
        head = _build_head(head, model, folder)
        _add_adapter(model, config, weights, name, folder)
    disable_cpu_4bit_repacking(model)
    return RewardModel(model, name, head, tokenizer, normalisation, folder, name, batch_size)


def load_full_reward(
    folder: str | Path, name: str, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32, **options: Any
) -> RewardModel:
    """A reward model with weights of its own (`use_peft: false`, or a merged one), as a role.

    Args:
        folder: a sequence classifier with one label, and its tokenizer.
        name: what TRL logs its rewards under.
        tokenizer: the policy's.
        batch_size: completions a forward pass, when called as a reward function.
        options: more of `from_pretrained`'s arguments (`dtype`, `device_map`, ...).

    Raises:
        RecipeError: if it cannot be loaded, a weight is not in its files, or its tokenizer or chat template differs.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise RecipeError(f"{folder} holds an adapter, not a whole model: put it on its base with `load_reward_adapter`")
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **options
        )
    except Exception as error:  # as in `load_architecture`
        raise RecipeError(f"{folder}: no usable reward model there ({first_line(error)})") from error
    if loading["missing_keys"]:
        raise RecipeError(f"{folder}: its files lack {', '.join(sorted(loading['missing_keys']))}: it would score at random")
    check_finite(dict(model.named_parameters()), folder)
    check_tokenizer(folder, tokenizer)
    head = _build_head({"weight": read_head(folder, _find_head(model).weight.data, options.get("revision"))}, model, folder)
    normalisation = read_normalisation(read_json(folder / REWARD), folder)
    disable_cpu_4bit_repacking(model)
    return RewardModel(model.eval(), None, head, tokenizer, normalisation, folder, name, batch_size)


def read_head(name: str | Path, loaded: Tensor, revision: str | None = None) -> Tensor:
    """The weight of a whole model's head as it stands in its file, in fp32: `from_pretrained` rounds it to the base's type.

    Args:
        name: folder, or name on the Hub.
        loaded: the weight as it was loaded; returned where the file has another name for it.
        revision: of the model on the Hub.
    """
    key, options = f"{HEAD}.weight", {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **options)
    file = read_json(Path(index)).get("weight_map", {}).get(key) if index else SAFE_WEIGHTS_NAME
    path = file and cached_file(name, file, **options)
    if not path:
        return loaded
    with safe_open(path, "pt") as weights:
        return weights.get_tensor(key).float() if key in weights.keys() else loaded  # noqa: SIM118 (no mapping)


def load_saved_reward(
    folder: str | Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    combine: str | None = None,
    uncertainty_coef: float | None = None,
    batch_size: int = 32,
) -> Scorer:
    """What `recipes/reward.py` saved, whatever it is: an adapter, an ensemble of them, or a whole model.

    An adapter is put on the policy's base, under the name of the folder; a whole model on the device of this process. A model
    without a scale is warned of: its scores are raw.

    Args:
        folder: of the reward model or of the ensemble, whose members are those that its `reward.json` lists. A whole model may
            be named by its name on the Hub too (from Python: in YAML a reward is a folder or a dotted path).
        model: the policy: the base with its adapters.
        tokenizer: the policy's.
        combine: of an ensemble, if not as it was trained to.
        uncertainty_coef: likewise.
        batch_size: completions a forward pass.

    Raises:
        RecipeError: as in `load_reward_adapter` and `load_full_reward`; for an adapter where `model` has none;
            for `combine` or `uncertainty_coef` where there is no ensemble; and for one that was not finished.
    """
    folder = Path(folder)
    stored = read_json(folder / REWARD).get("ensemble")
    if stored is not None:
        names, trained, coefficient = read_ensemble(stored, folder)
        rewards = [_load_saved(folder / name, model, tokenizer, f"{folder.name}-{name}", batch_size) for name in names]
        coefficient = coefficient if uncertainty_coef is None else uncertainty_coef
        return Ensemble(rewards, combine or trained, coefficient, folder.name)
    alone = any((folder / name).exists() for name in ("adapter_config.json", "config.json"))
    if not alone and any(folder.glob("member-*/*config.json")):
        raise RecipeError(
            f"{folder} holds members of an ensemble, and no {REWARD} that lists them: it was not finished; go on with "
            "`resume_from_checkpoint: true`, or name one member"
        )
    if combine is not None or uncertainty_coef is not None:
        raise RecipeError(f"{folder} holds one reward model: `combine` and `uncertainty_coef` are for ensembles: remove them")
    return _load_saved(folder, model, tokenizer, folder.name, batch_size)


def _load_saved(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, batch_size: int) -> RewardModel:
    if not (folder / "adapter_config.json").exists():
        # where the policy is, or will be when its trainer has placed it
        reward = load_full_reward(folder, name, tokenizer, batch_size, device_map={"": PartialState().device})
    elif not isinstance(model, PeftModel):
        raise RecipeError(f"{folder} is an adapter, which needs a base that stays as it is: set `use_peft: true`, or merge it")
    else:
        name = name.replace(".", "_")  # PyTorch allows no dots there
        taken = sum(other == name or other.startswith(f"{name}_") for other in model.peft_config)
        reward = load_reward_adapter(model, folder, f"{name}_{taken + 1}" if taken else name, tokenizer, batch_size)
    if reward.normalisation is None:
        logger.warning(
            "%s has no scale (`normalisation` in %s): its raw scores are used, whose mean and spread are arbitrary; "
            "recipes/reward.py measures one at its end: go on with `resume_from_checkpoint: true` if it was interrupted",
            folder,
            REWARD,
        )
    return reward


def _adapter_config(folder: Path) -> LoraConfig:
    """The configuration of a reward adapter.

    Raises:
        RecipeError: if there is none in the folder, or one of another kind.
    """
    config = read_adapter_config(folder)
    if config.peft_type != "LORA":
        raise RecipeError(f"{folder}: a reward adapter is LoRA (peft_type LORA), and this is {config.peft_type.value}")
    if (task := config.task_type) != "SEQ_CLS":
        raise RecipeError(f"{folder}: a reward adapter has task_type SEQ_CLS, and this one has {task}: it is no reward model")
    others = set(config.modules_to_save or ()) - _HEAD_NAMES
    if others:
        raise RecipeError(
            f"{folder}: besides LoRA and its head it trained {', '.join(sorted(others))}, which cannot share a base with others"
        )
    return config


def _adapter_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the adapter, under PEFT's names, and those of its head, under their own.

    Raises:
        RecipeError: if the file is missing or damaged, or there is no head in it.
    """
    path = folder / ADAPTER
    weights = {name: weight.float() for name, weight in read_weights(path).items()}
    prefix = f"{PREFIX}{HEAD}."
    head = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
    if "weight" not in head:
        raise RecipeError(f"{path} has no head ({prefix}weight): the adapter would score at random; train or save it again")
    return weights, head


def _add_adapter(
    model: PreTrainedModel | PeftModel, config: LoraConfig, weights: dict[str, Tensor], name: str, folder: Path
) -> None:
    config.task_type, config.modules_to_save, config.inference_mode = None, None, True
    with restore_adapter_state(model):
        with fitting(str(folder), model):
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                with warnings.catch_warnings():  # several adapters on one base are what roles are
                    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                    inject_adapter_in_model(config, model, adapter_name=name)
        if not isinstance(model, PeftModel):
            weights = {key.removeprefix(PREFIX): weight for key, weight in weights.items()}
        cast_adapter_dtype(model, name)  # to fp32, before the weights come in
        fill_adapter(model, weights, name, folder)


def fill_adapter(model: nn.Module, weights: dict[str, Tensor], name: str, folder: str | Path) -> None:
    """Puts saved weights into an adapter that is on the model; none of the two has any that the other lacks.

    Args:
        model: with the adapter.
        weights: under the names of PEFT's files, which on a `PeftModel` begin with `PREFIX`.
        name: of the adapter.
        folder: where the weights come from, for messages.

    Raises:
        RecipeError: if a weight has no counterpart, or one of another shape.
    """
    try:
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RecipeError(f"{folder}: its weights do not fit {base_name(model)}: {reason}") from error
    missing = [key for key in result.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
    if strays := [*missing, *result.unexpected_keys]:
        raise RecipeError(f"{folder}: its weights do not fit {base_name(model)}: {strays[0]} has no counterpart")


def _build_head(weights: dict[str, Tensor], model: nn.Module, folder: Path) -> ScalarHead:
    embedding = backbone(model).get_input_embeddings()
    width = base_of(model).config.get_text_config().hidden_size
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != {"weight": (1, width)}:
        raise RecipeError(f"{folder}: a head of shape {shapes}, and {base_name(model)} needs one weight of (1, {width})")
    head = ScalarHead(width).requires_grad_(False)
    head.weight.data.copy_(weights["weight"])
    return head.to(embedding.weight.device)


def _find_head(model: PreTrainedModel) -> nn.Linear:
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise RecipeError(f"{base_name(model)}: {type(model).__name__} has no head `{HEAD}` with one output")
    return head
