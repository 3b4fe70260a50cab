"""Saved LoRA adapters: their configuration, their weights, and putting them on a base."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf_recipes.core.errors import RecipeError, first_line, lack_of_memory
from rlhf_recipes.core.files import read_json
from rlhf_recipes.models.backbone import base_name
from rlhf_recipes.models.weights import ADAPTER, read_weights

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from transformers import (
    PreTrainedModel,
)


def read_adapter_config(folder: str | Path, where: str = "") -> PeftConfig:
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


def load_adapter(
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
    config, weights = read_adapter_config(folder, where), read_weights(Path(folder) / ADAPTER)
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


def check_policy_adapter(where: str, task_type: str | None) -> None:
    """Refuses a reward model in the place of a policy: its adapter would load, and speak.

    Raises:
        RecipeError: for the task type of a reward model.
    """
    if task_type == "SEQ_CLS":
        raise RecipeError(f"{where} is a reward model (task_type SEQ_CLS), and no policy: name the adapter of recipes/sft.py")
