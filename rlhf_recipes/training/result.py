"""What a run leaves: its model or adapter, `log.jsonl`, and `recipe.json`."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_recipes.core.files import LOG, PENDING, RECIPE, read_json, write_json, write_text
from rlhf_recipes.core.provenance import peak_memory, versions
from rlhf_recipes.core.warning_log import warnings_so_far
from rlhf_recipes.export.model_card import write_card
from rlhf_recipes.export.upload import repository_name
from rlhf_recipes.models.loading import model_path
from rlhf_recipes.training.resume import remove_checkpoints

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import ModelConfig

_MODEL = ("config.json", "model*.safetensors*", "adapter_config.json", "adapter_model*.safetensors")
_SAVING = ".saving"  # folder in the output folder, until all of the result is written


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
    """Write the log up to a trainer's state; a resumed run logs the rest again."""
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
    """Write the record of a run, which `finish_record` makes `recipe.json`.

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
    record = {
        "recipe": recipe,
        "base_model": {"name": path, "revision": model.model_revision, **({"fingerprint": base} if base else {})},
        "parents": [*([path] if (Path(path) / RECIPE).exists() else []), *parents],
        "seed": trainer.args.seed,
        "versions": versions(),
        "run": recorder.measurements(trainer),
        "metrics": dict(sorted({key: entry[key] for entry in trainer.state.log_history for key in entry}.items())),
        "log": trainer.state.log_history,
        "data": report,
        "warnings": warnings_so_far(),
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


def save_result(trainer: Trainer, is_policy: bool) -> None:
    """Save the model or its adapter, and move it to the output folder when complete.

    From when the first file is moved to its place until the record is finished, the folder has no `recipe.json`.

    Args:
        trainer: after training.
        is_policy: whether it generates. Then its generation config names the EOS tokens: PEFT saves none beside an adapter, and
            the base's own may lack the EOS that was trained.
    """
    output, first = Path(trainer.args.output_dir), trainer.args.should_save
    partial = output / _SAVING
    if first:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed run
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(partial), _internal_call=True)
        if is_policy and first:
            _save_generation_config(trainer, partial)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)  # it may fill the disk
        raise
    if first:
        if (output / RECIPE).exists():
            os.replace(output / RECIPE, output / PENDING)  # has the cost, if it is of this run
        _remove(output, *_MODEL)  # of an earlier run: an adapter and a whole model, or other shards, would load as one
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(output / path.name, ignore_errors=True)
            os.replace(path, output / path.name)
        partial.rmdir()
    trainer.accelerator.wait_for_everyone()


def _save_generation_config(trainer: Trainer, folder: Path) -> None:
    config = trainer.model.generation_config
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    tokens = dict.fromkeys([trainer.processing_class.eos_token_id, *eos])
    config.eos_token_id = [token for token in tokens if token is not None]
    config.save_pretrained(folder)


def remove_results(output: Path, *others: str) -> None:
    """Remove an earlier run's record, checkpoints, model and log, and `others`."""
    (output / RECIPE).unlink(missing_ok=True)
    remove_checkpoints(output)
    _remove(output, *_MODEL, PENDING, LOG, *others)


def _remove(output: Path, *patterns: str) -> None:
    for path in [path for pattern in patterns for path in output.glob(pattern)]:
        path.unlink()
