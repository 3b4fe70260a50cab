"""Load the reward models that `recipes/reward.py` saved."""

import logging
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.core.files import ADAPTER, REWARD, read_json
from rlhf_recipes.inputs import reject_unfinished_ensemble
from rlhf_recipes.models.adapters import adapter_errors, add_adapter, read_adapter_config
from rlhf_recipes.models.architectures import register_classifier
from rlhf_recipes.models.backbone import backbone, hidden_width
from rlhf_recipes.models.fingerprint import check_base
from rlhf_recipes.models.precision import disable_cpu_4bit_repacking
from rlhf_recipes.models.roles import restore_adapter_state
from rlhf_recipes.models.tokenizer import check_tokenizer
from rlhf_recipes.models.weights import check_finite, read_weights
from rlhf_recipes.rewards.classifier import read_head, scalar_head
from rlhf_recipes.rewards.reward_json import read_ensemble, read_normalisation
from rlhf_recipes.rewards.reward_models import HEAD_IN_ADAPTER, Ensemble, RewardModel, ScalarHead, Scorer

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_reward_adapter(
    model: PreTrainedModel | PeftModel,
    folder: str | Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
) -> RewardModel:
    """Put a saved reward adapter, frozen, on a base in memory.

    Active adapters, what is trained, and the global random state stay as they are.

    Args:
        model: the base as a language model, with or without adapters.
        folder: result of `recipes/reward.py`.
        name: the adapter's name on this model.
        tokenizer: of the policy.
        batch_size: completions in a forward pass, when called as a reward function.

    Raises:
        RecipeError: if there is no reward adapter with a head, or it was trained on another base, or with another tokenizer or
            chat template; if `name` is taken.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    if config.peft_type != "LORA" or config.task_type != "SEQ_CLS":
        kind = f"peft_type {config.peft_type.value}, task_type {config.task_type}"
        raise RecipeError(f"{folder}: not a reward adapter: {kind}, where peft_type LORA and task_type SEQ_CLS are needed")
    # PEFT lists both names of a head for every sequence classifier
    if others := set(config.modules_to_save or ()) - {"score", "classifier"}:
        raise RecipeError(f"{folder}: trained {', '.join(sorted(others))} besides LoRA and its head, and cannot share a base")
    weights = {key: weight.float() for key, weight in read_weights(folder / ADAPTER).items()}
    head = weights.pop(HEAD_IN_ADAPTER, None)
    if head is None:
        raise RecipeError(
            f"{folder / ADAPTER}: has no head ({HEAD_IN_ADAPTER}), so it would score at random. Fix: train it again"
        )
    record = read_json(folder / REWARD)
    check_base(folder, config.base_model_name_or_path, record, model)
    check_tokenizer(folder, tokenizer)
    if name in getattr(model, "peft_config", {}):
        raise RecipeError(f"{folder}: the model has an adapter '{name}' already. Fix: choose another name")
    normalisation = read_normalisation(record, folder)
    config.task_type, config.modules_to_save = None, None  # the head stays outside of the model
    with torch.random.fork_rng(devices=[]), restore_adapter_state(model):
        head = _build_head(head, model, folder)
        adapted = add_adapter(model, config, weights, name, str(folder))
    disable_cpu_4bit_repacking(adapted)
    return RewardModel(adapted, name, head, tokenizer, normalisation, folder, name, batch_size)


def load_full_reward(
    folder: str | Path, name: str, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32, **options: Any
) -> RewardModel:
    """Load a reward model without adapter: `use_peft: false`, or merged.

    Args:
        folder: a sequence classifier with one label, and its tokenizer.
        name: under which TRL logs its rewards.
        tokenizer: of the policy.
        batch_size: completions in a forward pass, when called as a reward function.
        options: further arguments of `from_pretrained` (`dtype`, `device_map`, ...).

    Raises:
        RecipeError: if it cannot be loaded, weights are missing, or its tokenizer or chat template differs.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise RecipeError(f"{folder}: holds an adapter. Fix: put it on its base with `load_reward_adapter`")
    with error_context(f"{folder}: no usable reward model there", Exception):  # as in `load_architecture`
        register_classifier(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **options
        )
    if loading["missing_keys"]:
        names = ", ".join(sorted(loading["missing_keys"])[:3])
        raise RecipeError(f"{folder}: weights are missing in its files ({names}), so it would score at random")
    check_finite(dict(model.named_parameters()), folder)
    check_tokenizer(folder, tokenizer)
    head = _build_head(read_head(folder, scalar_head(model).weight.data, options.get("revision")), model, folder)
    normalisation = read_normalisation(read_json(folder / REWARD), folder)
    disable_cpu_4bit_repacking(model)
    return RewardModel(model.eval(), None, head, tokenizer, normalisation, folder, name, batch_size)


def load_saved_reward(
    folder: str | Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    combine: str | None = None,
    uncertainty_coef: float | None = None,
    batch_size: int = 32,
) -> Scorer:
    """Load any result of `recipes/reward.py`: adapter, ensemble or full model.

    An adapter goes on the policy's base, under the name of the folder; a full model on the device of this process. A model
    without a normalisation gives a warning.

    Args:
        folder: of the reward model, or of the ensemble whose `reward.json` lists its members. From Python, a full model may be
            named by its name on the Hub.
        model: the policy: the base with its adapters.
        tokenizer: of the policy.
        combine: for an ensemble, in place of how it was trained.
        uncertainty_coef: likewise.
        batch_size: completions in a forward pass.

    Raises:
        RecipeError: as in `load_reward_adapter` and `load_full_reward`; for an adapter where `model` has none; for `combine` or
            `uncertainty_coef` without an ensemble; for an unfinished ensemble.
    """
    folder = Path(folder)
    if ensemble := read_ensemble(folder):
        members, trained, coefficient = ensemble
        rewards = [_load_member(member, model, tokenizer, f"{folder.name}-{member.name}", batch_size) for member in members]
        return Ensemble(rewards, combine or trained, coefficient if uncertainty_coef is None else uncertainty_coef, folder.name)
    reject_unfinished_ensemble(folder)
    if combine is not None or uncertainty_coef is not None:
        raise RecipeError(f"{folder}: holds one reward model. Fix: remove `combine` and `uncertainty_coef`")
    return _load_member(folder, model, tokenizer, folder.name, batch_size)


def _load_member(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, batch_size: int) -> RewardModel:
    if not (folder / "adapter_config.json").exists():
        # where the policy is, or will be when its trainer has placed it
        reward = load_full_reward(folder, name, tokenizer, batch_size, device_map={"": PartialState().device})
    elif not isinstance(model, PeftModel):
        raise RecipeError(
            f"{folder}: is an adapter, and needs a base that is not trained. Fix: set `use_peft: true`, or merge it"
        )
    else:
        name = name.replace(".", "_")  # PyTorch allows no dots there
        taken = sum(other == name or other.startswith(f"{name}_") for other in model.peft_config)
        reward = load_reward_adapter(model, folder, f"{name}_{taken + 1}" if taken else name, tokenizer, batch_size)
    if reward.normalisation is None:
        logger.warning(
            "%s has no `normalisation` in %s: its raw scores are used, with any mean and spread. recipes/reward.py measures it "
            "at its end: resume it with `resume_from_checkpoint: true` if it was interrupted",
            folder,
            REWARD,
        )
    return reward


def _build_head(weight: Tensor, model: nn.Module, folder: Path) -> ScalarHead:
    head = ScalarHead(hidden_width(model)).requires_grad_(False)
    with adapter_errors(str(folder), model):
        head.load_state_dict({"weight": weight})
    return head.to(backbone(model).get_input_embeddings().weight.device)
