"""What a run leaves beside its result: `log.jsonl` and `recipe.json`."""

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_recipes.core.files import LOG, PENDING, RECIPE, read_json, write_json, write_text
from rlhf_recipes.core.provenance import peak_memory, versions
from rlhf_recipes.export.model_card import write_card
from rlhf_recipes.export.upload import repository_name
from rlhf_recipes.models.loading import model_path

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import ModelConfig


class RunRecorder(TrainerCallback):
    """Callback that writes `log.jsonl`, and measures time and peak memory."""

    def __init__(self) -> None:
        self.first_step, self.wall_time = None, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock, and the log with what was logged before the checkpoint."""
        self.first_step, self.start = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            write_log(args, state)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append the newest line to the log."""
        if state.is_world_process_zero and state.log_history:
            with (Path(args.output_dir) / LOG).open("a", encoding="utf-8") as file:
                file.write(_log_line(state.log_history[-1]))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self.wall_time = time.perf_counter() - self.start

    def measurements(self, trainer: Trainer) -> dict[str, Any]:
        """Return seconds, steps, tokens per second of all devices, peak bytes."""
        steps = 0 if self.first_step is None else trainer.state.global_step - self.first_step
        tokens = trainer.tokens_seen - trainer.first_token
        return {
            "wall_time_s": round(self.wall_time, 2),
            "steps": steps,
            "tokens_per_s": round(tokens / self.wall_time, 1) if tokens and steps else None,
            "peak_memory": peak_memory(),
        }


def write_log(args: TrainingArguments, state: TrainerState) -> None:
    """Write the log up to a trainer's state.

    A killed run logs again what came after its last checkpoint.
    """
    path = Path(args.output_dir) / LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(map(_log_line, state.log_history)))


def _log_line(entry: dict[str, Any]) -> str:
    """Return a line of JSON, with null for NaN and infinity."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()}
    return json.dumps(finite, default=str, sort_keys=True) + "\n"  # sorted, as checkpoints have it


def write_record(
    trainer: Trainer,
    recorder: RunRecorder,
    arguments: Iterable[Any],
    recipe: str,
    base: dict[str, Any] | None,
    parents: Sequence[str],
    report: dict[str, Any],
) -> None:
    """Write the record of a run: arguments, versions, seed, lineage, data and cost.

    It becomes `recipe.json`, which marks the stage as done, by `finish_record`.

    Args:
        trainer: after training.
        recorder: its callback.
        arguments: dataclasses of the recipe, as parsed.
        recipe: name of the recipe.
        base: fingerprint of the base; None for a model that is trained whole.
        parents: folders of earlier stages that the run read, besides the base.
        report: what was read and left out.
    """
    model = next(group for group in arguments if isinstance(group, ModelConfig))
    path, output = model_path(model), Path(trainer.args.output_dir)
    metrics: dict[str, float] = {}
    for entry in trainer.state.log_history:
        metrics.update(entry)
    record = {
        "recipe": recipe,
        "base_model": {"name": path, "revision": model.model_revision, **({"fingerprint": base} if base else {})},
        "parents": [*([path] if (Path(path) / RECIPE).exists() else []), *parents],
        "seed": trainer.args.seed,
        "versions": versions(),
        "run": recorder.measurements(trainer),
        "metrics": dict(sorted(metrics.items())),
        "log": trainer.state.log_history,
        "data": report,
        "arguments": {
            type(group).__name__: group.to_dict() if isinstance(group, TrainingArguments) else asdict(group)
            for group in arguments
        },
    }
    if not record["run"]["steps"]:  # resumed after its last step: an earlier process measured the cost
        record["run"] = (read_json(output / PENDING) or read_json(output / RECIPE) or record)["run"]
    write_json(output / PENDING, record)


def finish_record(training: TrainingArguments) -> dict[str, Any]:
    """Rename the record to `recipe.json`, write the model card, return the record."""
    output = Path(training.output_dir)
    os.replace(output / PENDING, output / RECIPE)
    write_card(output, repository_name(output, training.hub_model_id) if training.push_to_hub else None)
    return read_json(output / RECIPE)
