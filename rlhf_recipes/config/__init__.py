"""Argument dataclasses, the strict parser that fills them, and launchers."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any


def option(default: Any, help: str, choices: Sequence[str] = ()) -> Any:
    """Return a dataclass field; a default list or mapping is copied."""
    metadata = {"help": help} | ({"choices": [*choices]} if choices else {})
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
