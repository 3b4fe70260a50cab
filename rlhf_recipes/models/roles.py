"""Several LoRA adapters on one base, each a role of its own; one is active at a time."""

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator
from typing import Any

from rlhf_recipes.core.errors import RecipeError

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.functional import cast_adapter_dtype, set_adapter, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

logger = logging.getLogger(__name__)
POLICY = "default"
"""PEFT's name for an adapter that was not given one: that of the policy, which is trained."""
NO_ADAPTER = object()
"""For `use_adapter`: the base alone, without any adapter."""


@contextlib.contextmanager
def use_adapter(model: nn.Module, adapter: str | object | None, train: bool = False) -> Iterator[None]:
    """Within, `adapter` alone is active; afterwards all is as before.

    What is to be back-propagated must be so within: outside it would be recomputed with other adapters under gradient
    checkpointing.

    Args:
        model: with adapters, or without.
        adapter: its name; `NO_ADAPTER` for the base alone; None leaves the adapters alone.
        train: whether the adapter, and nothing else, is trainable within; if not, the model is in eval mode.

    Raises:
        RecipeError: if an adapter is merged into the base, which switching would undo.
    """
    if any(layer.merged for layer in _modules(model, BaseTunerLayer)):
        raise RecipeError("an adapter is merged into the base: unmerge it before another one is used")
    with restore_adapter_state(model):
        if adapter is not None:
            for layer in _modules(model, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                if layer.disable_adapters != (adapter is NO_ADAPTER):
                    layer.enable_adapters(adapter is not NO_ADAPTER)
            if adapter is not NO_ADAPTER:
                set_adapter(model, adapter, inference_mode=not train)
        if not train:
            model.eval()
        yield


def copy_adapter(model: PeftModel, source: str, name: str) -> None:
    """Adds a frozen copy of the adapter `source` under another name; which adapters are active stays as it is.

    Raises:
        RecipeError: if `name` is taken.
    """
    if name in model.peft_config:
        raise RecipeError(f"the model has an adapter '{name}' already: rename it")
    weights = {key: weight.clone() for key, weight in get_peft_model_state_dict(model, adapter_name=source).items()}
    with torch.random.fork_rng(devices=[]), restore_adapter_state(model):
        model.add_adapter(name, copy.deepcopy(model.peft_config[source]))
        cast_adapter_dtype(model, name)
        set_peft_model_state_dict(model, weights, adapter_name=name)


@contextlib.contextmanager
def save_single_adapter(model: nn.Module, adapter: str) -> Iterator[None]:
    """Within, `save_pretrained` of a `PeftModel` saves this adapter, and not the other roles on its base."""
    if not isinstance(model, PeftModel):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=[adapter])
    try:
        yield
    finally:
        del model.save_pretrained


@contextlib.contextmanager
def restore_adapter_state(model: nn.Module) -> Iterator[None]:
    """Puts back, at the end, the active adapters of each layer, `requires_grad` of each weight, and training mode.

    PEFT's own `set_adapter` makes everything trainable that it activates, and freezes the rest. Layers that come into being
    within have no active adapter afterwards, and nothing to train.
    """
    layers = {
        layer: (list(layer.active_adapters), layer.disable_adapters)
        for layer in _modules(model, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for layer in _modules(model, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            active, disabled = layers.get(layer, ([], False))
            layer.set_adapter(active)
            if layer.disable_adapters != disabled:
                layer.enable_adapters(not disabled)
        for weight in model.parameters():
            if weight.requires_grad != (weight in trained):
                weight.requires_grad_(weight in trained)
        for module in model.modules():
            mode = training.get(module, training[model])
            if module.training != mode:
                module.training = mode


def _modules(model: nn.Module, kind: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]
