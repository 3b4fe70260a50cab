"""The run of this process, which messages about its end name."""

from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.config.origins import Origin

if TYPE_CHECKING:  # recipes/label.py starts without PyTorch
    from transformers import Trainer


@dataclass
class CurrentRun:
    """The recipe that this process runs.

    Parameters:
        recipe: its file.
        config: its YAML file.
        origin: where its arguments come from.
        values: the fields of all its dataclasses.
        trainer: the trainer that was started last, or None.
    """

    recipe: Path
    config: Path
    origin: Origin
    values: dict[str, Any]
    trainer: "Trainer | None" = None


CURRENT_RUN: ContextVar[CurrentRun | None] = ContextVar("current_run", default=None)
"""Set by the parser; one process may run several recipes in turn."""


def set_trainer(trainer: "Trainer | None") -> None:
    """Make the trainer known to messages about the end of the run; None releases it."""
    if run := CURRENT_RUN.get():
        run.trainer = trainer
