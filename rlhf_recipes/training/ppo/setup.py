"""The roles of a run of PPO on one base: policy, reference and reward models."""

import copy
from pathlib import Path
from typing import Any

from rlhf_recipes.config.ppo import PPOConfig
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.precision import disable_cpu_4bit_repacking
from rlhf_recipes.models.roles import NO_ADAPTER, POLICY, copy_adapter
from rlhf_recipes.rewards.reward_funcs import SavedReward
from rlhf_recipes.rewards.reward_models import Scorer
from rlhf_recipes.rewards.saved import load_saved_reward

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path

REFERENCE = "reference"
"""Name of the adapter that is a frozen copy of the policy's."""


def prepare_policy(
    model: str | PreTrainedModel | PeftModel,
    args: PPOConfig,
    quantization_config: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
) -> tuple[PreTrainedModel | PeftModel, PPOConfig]:
    """Load the policy if it is a name, and add the adapter of `peft_config`.

    The arguments come back without those that loading has consumed.
    """
    if isinstance(model, str):
        options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None
        model = create_model_from_path(model, **options)
        args = copy.copy(args)
        args.model_init_kwargs = None
    elif quantization_config is not None:
        raise RecipeError("quantization_config: the model is loaded already. Fix: pass it when you load the model")
    disable_cpu_4bit_repacking(model)
    if not isinstance(model, PeftModel):
        return model if peft_config is None else get_peft_model(model, peft_config), args
    if peft_config is not None:
        raise RecipeError("peft_config: the model has an adapter already. Fix: leave `peft_config` out, or merge the adapter")
    if model.active_adapters != [POLICY]:
        raise RecipeError(
            f"model: active adapters {model.active_adapters}. Fix: load the policy as the adapter '{POLICY}', and activate it"
        )
    if not any(weight.requires_grad for weight in model.parameters()):
        raise RecipeError("model: the adapter is frozen. Fix: `PeftModel.from_pretrained(..., is_trainable=True)`")
    return model, args


def make_reference(model: PreTrainedModel | PeftModel, fresh_adapter: bool) -> PreTrainedModel | str | object:
    """Return the reference: a frozen model, an adapter's name, or `NO_ADAPTER`.

    The base alone is the policy at the start if its adapter is fresh.
    """
    if not isinstance(model, PeftModel):
        return copy.deepcopy(model).requires_grad_(False).eval()
    if fresh_adapter:
        return NO_ADAPTER
    copy_adapter(model, POLICY, REFERENCE)
    return REFERENCE


def load_rewards_onto(
    model: PreTrainedModel | PeftModel,
    reward_funcs: Any,
    reward_processing_classes: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
) -> list[Any]:
    """Return the rewards as a list, with saved reward models on the policy's base."""
    rewards, tokenizers = _as_list(reward_funcs), _as_list(reward_processing_classes)
    for reward, own in zip(rewards, tokenizers, strict=False):
        if own is not None and isinstance(reward, str | Path | SavedReward | Scorer):
            raise RecipeError(
                f"reward_processing_classes: the reward {getattr(reward, '__name__', reward)} reads the policy's tokens. Fix: "
                "None there, or load the sequence classifier and pass it as the reward"
            )
    loaded = []
    for reward in rewards:
        if isinstance(reward, str | Path):
            reward = SavedReward(str(reward))
        if isinstance(reward, SavedReward):
            size = args.local_rollout_forward_batch_size or args.per_device_train_batch_size
            options = (reward.combine, reward.uncertainty_coef, size)
            reward = load_saved_reward(reward.folder, model, tokenizer, *options)
        loaded.append(reward)
    return loaded


def _as_list(values: Any) -> list[Any]:
    """Return arguments that TRL takes alone or in a list as a list."""
    return [] if values is None else values if isinstance(values, list) else [values]
