"""What a trainer counts, left beside its checkpoints: a resumed run logs what the unbroken one does.

Transformers and TRL begin to count anew where a run is resumed: tokens, what the next line averages, the loss of all steps.
"""

import json
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import read_json, write_json

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

COUNTS = "counts-{}.json"
"""Of each process."""


class ResumeCounters(TrainerCallback):
    """Takes a trainer's counts up from the checkpoint that it goes on from, and leaves them beside each that it writes.

    Parameters:
        trainer: the trainer.
        checkpoint: what it goes on from, or None. One without counts, as TRL alone leaves them, is gone on from all the same.

    Raises:
        RecipeError: where the counts of the checkpoint are malformed.
    """

    def __init__(self, trainer: Trainer, checkpoint: str | None):
        self.trainer, self.known = trainer, _read(trainer, checkpoint) if checkpoint else {}
        save, log = trainer._save_rng_state, trainer.log

        def save_rng_state(folder: str) -> None:  # the last that each process writes before a checkpoint is whole
            save(folder)
            write_json(_path(trainer, folder), _counts(trainer))

        def log_all(logs: dict[str, float], *arguments: Any, **options: Any) -> None:
            if "train_loss" in logs and (self.known or not checkpoint):
                logs["train_loss"] = trainer._total_loss_scalar / max(trainer.state.global_step, 0.001)
            log(logs, *arguments, **options)

        trainer._save_rng_state, trainer.log = save_rng_state, log_all

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes up the counts, which the trainer has just begun anew."""
        if self.known:
            self.trainer._tr_loss = torch.tensor(self.known["loss"], device=args.device)
            self.trainer._total_loss_scalar = self.known["total_loss"]
            self.trainer._globalstep_last_logged = self.known["last_logged"]
            if hasattr(self.trainer, "_total_train_tokens"):
                self.trainer._total_train_tokens = self.known["tokens"]
            for name, values in self.known["metrics"].items():
                self.trainer._metrics["train"][name] = [*values]
        self.trainer.tokens_before = tokens(self.trainer)

    def log_end(self) -> None:
        """Adds the last line to the log of a run that was broken off after its last step."""
        trainer = self.trainer
        trainer._total_loss_scalar = 0.0
        self.on_train_begin(trainer.args, trainer.state, trainer.control)
        if self.known:
            trainer._total_loss_scalar += trainer._tr_loss.item()
            trainer.model.train(self.known["training"])  # by which TRL tells whose numbers they are
            trainer.log({"total_flos": trainer.state.total_flos, "train_loss": 0.0})


def tokens(trainer: Trainer) -> int:
    """The tokens that a trainer has trained on, or as PPO sampled, since the first step."""
    return getattr(trainer, "_total_train_tokens", 0) or trainer.state.num_input_tokens_seen


def _counts(trainer: Trainer) -> dict[str, Any]:
    metrics = getattr(trainer, "_metrics", {}).get("train", {})
    return {
        "loss": trainer._tr_loss.item(),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "tokens": getattr(trainer, "_total_train_tokens", 0),
        "training": trainer.model.training,
        "metrics": json.loads(json.dumps(metrics, default=float)),
    }


def _path(trainer: Trainer, folder: str) -> Path:
    return Path(folder) / COUNTS.format(trainer.args.process_index)


def _read(trainer: Trainer, checkpoint: str) -> dict[str, Any]:
    """What was left beside a checkpoint, or nothing.

    Raises:
        RecipeError: if it is malformed.
    """
    path = _path(trainer, checkpoint)
    known = read_json(path)
    if not known:
        return {}
    numbers = [known.get(key) for key in ("loss", "total_loss", "last_logged", "tokens")]
    metrics = known.get("metrics")
    lists = metrics.values() if isinstance(metrics, dict) else [None]
    values = [*numbers, *(value for one in lists for value in (one if isinstance(one, list) else [None]))]
    if not all(type(value) in (int, float) for value in values) or type(known.get("training")) is not bool:
        raise RecipeError(f"{path}: was not written by a training: delete it, or go on from another checkpoint")
    return known
