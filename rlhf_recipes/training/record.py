"""What a run leaves beside its result: `log.jsonl` and `recipe.json`."""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_recipes.core.files import LOG, PENDING, RECIPE, read_json, write_json, write_text
from rlhf_recipes.core.provenance import peak_memory, versions
from rlhf_recipes.export.model_card import write_card
from rlhf_recipes.export.upload import repository_name
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.loading import model_path
from rlhf_recipes.training.resume import result_arguments

import torch
from accelerate.utils import is_peft_model
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import ModelConfig


class RunRecorder(TrainerCallback):
    """Measures the wall time of training (evaluations and checkpoints included) and the memory at its peak.

    Beside every checkpoint it leaves the arguments that the result depends on, for `checkpoint_to_resume` to compare; and in
    `log.jsonl` a line for everything that is logged, as it is logged. It takes the fingerprint of the base that adapters stand
    on at the start: FSDP and ZeRO leave no process whole weights to take it of.
    """

    def __init__(self, *arguments: Any):
        self.arguments = result_arguments(arguments)
        self.first_step, self.wall_time = None, 0.0
        self.base: dict[str, Any] | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **kwargs: Any
    ) -> None:
        """Looks at the base; a model that is trained whole will be another."""
        self.base = fingerprint(model) if is_peft_model(model) else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts the clock, and the log: of a resumed run, with what was logged before its checkpoint."""
        self.first_step, self.start = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            write_log(args, state)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds a line to the log."""
        if state.is_world_process_zero and state.log_history:
            with (Path(args.output_dir) / LOG).open("a", encoding="utf-8") as file:
                file.write(_log_line(state.log_history[-1]))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops the clock."""
        self.wall_time = time.perf_counter() - self.start

    def measured(self, trainer: Trainer) -> dict[str, Any]:
        """Seconds, steps, tokens per second (of this process's run, all devices) and peak memory in bytes."""
        steps = 0 if self.first_step is None else trainer.state.global_step - self.first_step
        trained_on = trainer.tokens_seen - trainer.first_token
        return {
            "wall_time_s": round(self.wall_time, 2),
            "steps": steps,
            "tokens_per_s": round(trained_on / self.wall_time, 1) if trained_on and steps else None,
            "peak_memory": peak_memory(),
        }


def write_log(args: TrainingArguments, state: TrainerState) -> None:
    """Writes the log as far as a trainer knows it: what a killed run had added after its last checkpoint will come again."""
    path = Path(args.output_dir) / LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(map(_log_line, state.log_history)))


def _log_line(entry: dict[str, Any]) -> str:
    """One line of JSON, which knows no NaN and no infinity."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()}
    return json.dumps(finite, default=str, sort_keys=True) + "\n"  # as checkpoints have them


def write_record(
    trainer: Trainer,
    meter: RunRecorder,
    model: ModelConfig,
    training: TrainingArguments,
    *arguments: Any,
    data: dict[str, Any],
    recipe: str,
    parents: Sequence[str] = (),
    pending: bool = False,
) -> None:
    """Writes `recipe.json` into the trainer's output folder: arguments, versions, seed, lineage, data and cost of the run.

    And a model card that says so.

    Args:
        trainer: the trainer, after training.
        meter: its callback.
        model: the model arguments, of which the base and its parents come.
        training: the trainer's arguments as they were parsed.
        arguments: the other dataclasses of the recipe (data, ...).
        data: what `load_data` and `check_lengths` reported.
        recipe: the recipe's name.
        parents: folders of earlier stages that the run began with, besides the base.
        pending: whether something is left to do before the stage is done: until `finish_record`, the file has another name.
    """
    if not trainer.is_world_process_zero():
        return
    base = model_path(model)
    identity = {"fingerprint": meter.base} if meter.base else {}
    record = {
        "recipe": recipe,
        "base_model": {"name": base, "revision": model.model_revision, **identity},
        "parents": [*([base] if (Path(base) / RECIPE).exists() else []), *parents],
        "seed": trainer.args.seed,
        "versions": versions(),
        "run": meter.measured(trainer),
        "metrics": _last_metrics(trainer),
        "log": trainer.state.log_history,
        "data": data,
        "arguments": {
            **{type(group).__name__: asdict(group) for group in (model, *arguments)},
            type(training).__name__: training.to_dict(),
        },
    }
    output = Path(trainer.args.output_dir)
    if not record["run"]["steps"]:  # resumed at its end: what it cost was written then
        record["run"] = (read_json(output / PENDING) or read_json(output / RECIPE) or record)["run"]
    write_json(output / PENDING, record)
    if not pending:
        finish_record(training)


def finish_record(training: TrainingArguments) -> dict[str, Any]:
    """Gives a pending record its name, by which the stage is done, and returns it; the model card is written."""
    output = Path(training.output_dir)
    os.replace(output / PENDING, output / RECIPE)
    write_card(output, repository_name(output, training.hub_model_id) if training.push_to_hub else None)
    return read_json(output / RECIPE)


def _last_metrics(trainer: Trainer) -> dict[str, float]:
    """The newest value of everything that was logged."""
    metrics: dict[str, float] = {}
    for entry in trainer.state.log_history:
        metrics.update(entry)
    return dict(sorted(metrics.items()))  # those of a checkpoint have this order
