"""Several LoRA adapters on one base, each a role; one is active at a time."""

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
"""PEFT's default adapter name: the policy, which is trained."""
NO_ADAPTER = object()
"""Stands for the base alone in `use_adapter`."""


@contextlib.contextmanager
def use_adapter(model: nn.Module, adapter: str | object | None, train: bool = False) -> Iterator[None]:
    """Activate one adapter inside the block, and restore everything afterwards.

    Back-propagate inside the block: outside of it, gradient checkpointing would recompute with another adapter, silently.

    Args:
        model: with or without adapters.
        adapter: its name; `NO_ADAPTER` for the base alone; None leaves the adapters as they are.
        train: whether this adapter alone is trainable. If not, the model is in eval mode.

    Raises:
        RecipeError: if an adapter is merged into the base, which switching would undo.
    """
    if any(layer.merged for layer in _modules(model, BaseTunerLayer)):
        raise RecipeError("an adapter is merged into the base. Fix: unmerge it before using another one")
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
    """Add a frozen copy of an adapter under another name, without activating it.

    Raises:
        RecipeError: if `name` is taken.
    """
    if name in model.peft_config:
        raise RecipeError(f"the model has an adapter '{name}' already. Fix: choose another name")
    weights = {key: weight.clone() for key, weight in get_peft_model_state_dict(model, adapter_name=source).items()}
    with torch.random.fork_rng(devices=[]), restore_adapter_state(model):
        model.add_adapter(name, copy.deepcopy(model.peft_config[source]))
        cast_adapter_dtype(model, name)
        set_peft_model_state_dict(model, weights, adapter_name=name)


@contextlib.contextmanager
def save_single_adapter(model: nn.Module, adapter: str) -> Iterator[None]:
    """Make `save_pretrained` save this adapter only, inside the block."""
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
    """Restore active adapters, `requires_grad` and training mode after the block.

    PEFT's `set_adapter` makes trainable what it activates, and freezes the rest. Adapter layers that are created inside the
    block are left inactive and frozen.
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
