"""Dropout, wherever a model keeps its rate."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

_RATES = re.compile(r"dropout|pdrop|layer_?drop|drop_?path|drop_rate|jitter")
"""Names of rates: of dropout, of layers and paths that are left out, and of the noise in routers of experts."""


def disable_dropout(model: nn.Module) -> None:
    """Turn off dropout and other noise of training, for good.

    Many families have no dropout module: their attention reads a number, `attention_dropout`, from a module or from the
    configuration. TRL's `disable_dropout_in_model` knows modules only. A configuration that is saved later has rates of 0.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for holder in (module, *_configurations(getattr(module, "config", None))):
            for name, value in vars(holder).items():
                if value and _RATES.search(name) and isinstance(value, int | float) and not isinstance(value, bool):
                    setattr(holder, name, 0.0)


def _configurations(config: Any) -> Iterator[PreTrainedConfig]:
    """Yield a model's configuration and those inside it."""
    if isinstance(config, PreTrainedConfig):
        yield config
        for inner in vars(config).values():
            yield from _configurations(inner)
