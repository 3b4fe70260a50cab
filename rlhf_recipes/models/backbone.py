"""Parts of a model: its base without adapters, and the backbone below its head."""

from typing import Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """Return the model below the adapters, or the model itself if it has none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_name(model: torch.nn.Module) -> str:
    """Return the Hub name or folder of a model's base."""
    return base_of(model).name_or_path or type(base_of(model)).__name__


def backbone(model: torch.nn.Module) -> torch.nn.Module:
    """Return the part below the head, from tokens to hidden states."""
    return base_of(model).base_model


def hidden_width(model: torch.nn.Module) -> int:
    """Return the width of the states that the head reads.

    In OPT-350m's kind it is less than `hidden_size`.
    """
    base = base_of(model)
    head = base.get_output_embeddings() or getattr(base, "score", None)
    return getattr(head, "in_features", base.config.get_text_config().hidden_size)


def forward_backbone(model: torch.nn.Module, **inputs: Any) -> Any:
    """Run the backbone; return Transformers' outputs with `last_hidden_state`.

    FSDP gathers weights outside of layers (embeddings, last norm) when its root is called. A backbone that is called past the
    root would compute with one shard of them.
    """
    if not isinstance(model, FSDPModule):
        return backbone(model)(**inputs)
    if not hasattr(model, "_forward_backbone"):
        model._forward_backbone = lambda **inputs: backbone(model)(**inputs)
        register_fsdp_forward_method(model, "_forward_backbone")
    return model._forward_backbone(**inputs)
