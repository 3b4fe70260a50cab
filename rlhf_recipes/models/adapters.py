"""Read saved LoRA adapters and put them on a base."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf_recipes.core.errors import RecipeError, error_context, lack_of_memory
from rlhf_recipes.core.files import read_json
from rlhf_recipes.inputs import require_start
from rlhf_recipes.models.backbone import base_name

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.functional import set_peft_model_state_dict
from transformers import PreTrainedModel


def read_adapter_config(folder: str | Path, where: str = "") -> PeftConfig:
    """Return the configuration of the adapter in a folder that the key `where` names.

    Raises:
        RecipeError: if there is no adapter, or PEFT rejects its configuration.
    """
    place, path = f"{where}: {folder}" if where else folder, Path(folder) / "adapter_config.json"
    with error_context(where) if where else contextlib.nullcontext():
        require_start(folder)
    if read_json(path).get("megatron_config"):  # with it, PEFT imports a module of any name
        raise RecipeError(f"{place}: adapter_config.json: megatron_config: is not supported")
    with error_context(f"{place}: adapter_config.json", Exception):  # PEFT checks some values, and trips over others
        return PeftConfig.from_pretrained(str(folder))


def add_adapter(
    model: PreTrainedModel | PeftModel,
    config: PeftConfig,
    weights: Mapping[str, torch.Tensor],
    name: str,
    where: str,
    trainable: bool = False,
) -> PeftModel:
    """Put an adapter with these weights on a base, beside the adapters that it has.

    Args:
        model: the base, or a model with adapters.
        config: of the adapter.
        weights: under the names of PEFT's files.
        name: of the adapter on this model.
        where: the key and folder of the adapter, for messages.
        trainable: whether the adapter will be trained.

    Returns:
        `model`, or a `PeftModel` around it if it was a base.

    Raises:
        RecipeError: if the adapter does not fit the base, or lacks weights.
    """
    config.inference_mode = not trainable
    with adapter_errors(where, model):
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
            with warnings.catch_warnings():  # several roles on one base are intended
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                model = kind(model, config, adapter_name=name)
        check_adapter_complete(model, name, weights, where)
        set_peft_model_state_dict(model, dict(weights), adapter_name=name)
    return model


@contextlib.contextmanager
def adapter_errors(where: str, model: torch.nn.Module) -> Iterator[None]:
    """Turn errors about an adapter that does not fit into one line.

    Raises:
        RecipeError: with the last line of their message. A lack of memory passes through.
    """
    try:
        yield
    except Exception as error:  # PEFT has no common class for them
        if isinstance(error, RecipeError) or lack_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise RecipeError(f"{where}: the adapter does not fit {base_name(model)}: {reason}") from error


def check_adapter_complete(model: PeftModel, name: str, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse weights that do not cover an adapter, or that it has no place for.

    PEFT leaves missing weights at random values, and drops superfluous ones.

    Raises:
        RecipeError: names the first such weight.
    """
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if missing := sorted(expected.keys() - weights.keys()):
        raise RecipeError(f"{where}: {len(missing)} of the adapter's weights are missing ({missing[0]}). Fix: train it again")
    # PEFT saves the base's embeddings and LM head beside an adapter on them
    of_base = (".base_layer.", "embed", "lm_head")
    others = [key for key in weights.keys() - expected.keys() if "lora_" in key or not any(part in key for part in of_base)]
    if others:
        raise RecipeError(f"{where}: the adapter does not fit {base_name(model)}, which has no place for {min(others)}")


def check_policy_adapter(where: str, task_type: str | None) -> None:
    """Refuse a reward model in place of a policy: its adapter would load, and write.

    Raises:
        RecipeError: for the task type of a reward model.
    """
    if task_type == "SEQ_CLS":
        raise RecipeError(f"{where}: is a reward model (task_type SEQ_CLS). Fix: name an adapter of SFT, DPO or PPO")
