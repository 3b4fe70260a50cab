"""What a run leaves beside its result: `recipe.json`; and where an interrupted run goes on."""

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_recipes.config.trackers import begin_tracking, complaint_of_tracker
from rlhf_recipes.core.errors import RecipeError, first_line, lack_of_memory
from rlhf_recipes.core.files import LOG, PENDING, RECIPE, read_json, write_json, write_text
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.export.model_card import write_card
from rlhf_recipes.export.upload import repository_of
from rlhf_recipes.models.loading import (
    ADAPTER,
    check_adapter_complete,
    check_finite,
    each_weight,
    fingerprint,
    model_path,
    read_weights,
    resolve_path,
)
from rlhf_recipes.training.counters import ResumeCounters, tokens

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import ModelConfig

ARGUMENTS = "arguments.json"
STATE = "trainer_state.json"  # of a checkpoint, written last
PACKAGES = ("rlhf-recipes", "torch", "trl", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "evaluate")


# Of a checkpoint's state. Some that are given as whole numbers are written as 100.0
_NUMBERS = ("global_step", "epoch", "max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")
_NUMBERS += ("train_batch_size", "num_input_tokens_seen", "total_flos", "best_global_step")
_ANOTHER = "go on from another checkpoint, or start anew"

# What may differ between a run and the one that goes on from its checkpoint; all else decides the result.
_FREE = ("output_dir", "resume_from_checkpoint", "max_steps", "num_train_epochs", "report_to", "run_name", "disable_tqdm")
_FREE += ("ensemble_combine", "uncertainty_coef", "demonstrations")
_FREE_PREFIXES = ("logging_", "log_", "save_", "eval_", "per_device_eval_", "push_", "hub_", "trackio_", "project")


# What is left of a model that was trained whole, and of an adapter.
_WHOLE = ("config.json", "model*.safetensors*")
_ADAPTER = ("adapter_config.json", "adapter_model*.safetensors")

_SAVING = ".saving"
"""Of a result that is not in its place yet, beside it."""


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

    def leave_arguments(self, folder: str | Path) -> None:
        """Leaves the arguments beside a checkpoint."""
        write_json(Path(folder) / ARGUMENTS, self.arguments)

    def measured(self, trainer: Trainer) -> dict[str, Any]:
        """Seconds, steps, tokens per second (of this process's run, all devices) and peak memory in bytes."""
        steps = 0 if self.first_step is None else trainer.state.global_step - self.first_step
        trained_on = tokens(trainer) - getattr(trainer, "tokens_before", 0)
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


def peak_memory() -> dict[str, Any]:
    """The most memory that was in use: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "bytes": torch.cuda.max_memory_allocated()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"device": "process on CPU", "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


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
    write_card(output, repository_of(output, training.hub_model_id) if training.push_to_hub else None)
    return read_json(output / RECIPE)


def versions() -> dict[str, str]:
    """Those of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def checkpoint_to_resume(training: TrainingArguments, *arguments: Any) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means, or None for a start from the beginning.

    `true` is the newest whole checkpoint of `output_dir`, if there is any; it must come from a run of the same arguments, but
    for those that do not decide the result. A checkpoint that is named is taken whatever run it comes from.

    Args:
        training: the trainer's arguments, for `resume_from_checkpoint` and `output_dir`.
        arguments: the other dataclasses of the recipe.

    Raises:
        RecipeError: if what is named is no whole checkpoint, the newest one was made with other arguments, or a run would start
            anew over an unfinished one.
    """
    wanted, output = training.resume_from_checkpoint, Path(training.output_dir)
    check_writable(output)
    if wanted in (None, False, "false", "False"):
        refuse_unfinished(output)
        if (output / RECIPE).exists():
            PartialState().print(f"{output} holds a finished run, which this one will replace")
        return None
    if wanted not in (True, "true", "True"):
        if not _is_whole(Path(wanted)):
            raise RecipeError(f"resume_from_checkpoint: {wanted} is not a whole checkpoint (trainer state and optimizer)")
        return wanted
    newest = max(filter(_is_whole, checkpoints_in(output)), key=step_of, default=None)
    if newest is not None:
        _check_same_run(newest, result_arguments((training, *arguments)))
    return str(newest) if newest else None


def files_in(values: Any, leave_out: Iterable[Path | None] = ()) -> list[tuple[str, int, int]]:
    """Path, size and time (ns) of every file that is named, or lies in a folder that is.

    Args:
        values: texts, in lists and mappings; those that are no paths are passed over.
        leave_out: folders and files that are not looked at.
    """
    if isinstance(values, dict | list):
        items = values.values() if isinstance(values, dict) else values
        return [found for item in items for found in files_in(item, leave_out)]
    if not isinstance(values, str) or len(values) > 1000:
        return []
    try:
        named = Path(resolve_path(values)).expanduser()
        files = [named] if named.is_file() else sorted(named.rglob("*")) if named.is_dir() else []
        files = [path for path in files if path.is_file() and not {path, *path.parents} & set(leave_out)]
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except (OSError, RuntimeError, ValueError):  # a text that is no path
        return []


def run_dependencies(configs: Sequence[str], recipes: Path, inputs: Sequence[str | Path | None]) -> None:
    """Runs the stages of these YAML files, in order, whose `output_dir` is read and holds no result yet.

    Args:
        configs: each named as the recipe that it is for (`sft.yaml` by `sft.py`).
        recipes: the folder of the recipes.
        inputs: the folders that are read. Who names another one than a YAML file says does not need that stage.

    Raises:
        RecipeError: if a file is missing, or a stage fails; of several processes, which wait for one another for half an hour
            at the most, if there is anything to run.
    """
    for config in configs:
        path = Path(config) if Path(config).exists() else recipes.parent / config
        output = read_yaml(path).get("output_dir")
        if not output or Path(output) not in map(Path, filter(None, inputs)) or (Path(output) / RECIPE).exists():
            continue
        recipe = recipes / f"{path.stem}.py"
        if PartialState().num_processes > 1:
            raise RecipeError(
                f"needs: {output} has no result yet, and a stage of several processes cannot wait for another: first run "
                f"`accelerate launch {recipe} --config {path}`"
            )
        print(f"{output}: no result yet: running {path} first", flush=True)
        command = [sys.executable, str(recipe), "--config", str(path), "--resume_from_checkpoint", "true"]
        if subprocess.run(command).returncode:
            raise RecipeError(f"needs: {path}: this stage failed; its own message is above")


def train(trainer: Trainer, checkpoint: str | None) -> None:
    """Trains, from the beginning or from a checkpoint; one of the last step is loaded, and nothing more is trained.

    Transformers would take a step beyond `max_steps` there. The last line of its log is added, if that is lacking. Where
    a run starts anew in the folder of a finished one, the checkpoints of that one go: they would be taken for its own.
    """
    if checkpoint is None and trainer.is_world_process_zero():
        (Path(trainer.args.output_dir) / PENDING).unlink(missing_ok=True)
        for old in checkpoints_in(Path(trainer.args.output_dir)):
            remove_checkpoint(old)
    begin_tracking(trainer.args)
    counts = ResumeCounters(trainer, checkpoint)
    trainer.add_callback(counts)
    _leave_arguments(trainer)
    trainer.create_model_card = lambda *_, **__: None  # which TRL writes at every checkpoint over that of an earlier result
    if checkpoint:
        _explain_resumption(trainer, checkpoint)
        state, args = _state_of(Path(checkpoint)), trainer.args
        done = state.global_step >= args.max_steps if args.max_steps > 0 else state.epoch >= args.num_train_epochs
        if done:
            trainer._load_from_checkpoint(checkpoint)
            trainer._load_rng_state(checkpoint)
            trainer.state = state
            if trainer.is_world_process_zero():
                write_log(trainer.args, state)
            if not any("train_loss" in entry for entry in state.log_history):
                counts.log_end()
            return
    with annotate_failure(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)


def _leave_arguments(trainer: Trainer) -> None:
    """Has the arguments of the run stand beside a checkpoint before it is whole: on others it is not gone on from."""
    save = trainer._save_rng_state

    def save_rng_state(folder: str) -> None:
        save(folder)
        for meter in trainer.callback_handler.callbacks:
            if isinstance(meter, RunRecorder) and trainer.is_world_process_zero():
                meter.leave_arguments(folder)

    trainer._save_rng_state = save_rng_state


def _state_of(checkpoint: Path) -> TrainerState:
    path = checkpoint / STATE
    try:
        state = TrainerState.load_from_json(str(path))
        for name in _NUMBERS:
            value = getattr(state, name)
            if value is not None and (type(value) not in (int, float) or not 0 <= value < math.inf):
                raise ValueError(f"{name}: {value!r} is no number from 0")
        if type(state.global_step) is not int or state.epoch is None:
            raise ValueError(f"global_step {state.global_step!r} and epoch {state.epoch!r} say not how far it has come")
        best = state.best_metric, state.best_model_checkpoint
        if not isinstance(best[0], int | float | None) or not isinstance(best[1], str | None):
            raise ValueError(f"best_metric {best[0]!r} and best_model_checkpoint {best[1]!r} are none")
        if not isinstance(state.log_history, list) or not all(isinstance(entry, dict) for entry in state.log_history):
            raise ValueError("log_history is no list of mappings")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RecipeError(f"resume_from_checkpoint: {path}: {first_line(error)}: {_ANOTHER}") from error
    return state


def _explain_resumption(trainer: Trainer, checkpoint: str) -> None:
    """Has what a damaged checkpoint raises, and what it would silently bring in, said in one message.

    Transformers reads its pickles (optimizer, schedule, random state) with `weights_only`: what else they hold is not run.
    """

    def explained(load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def loading(*arguments: Any, **options: Any) -> Any:
            try:
                return load(*arguments, **options)
            except RecipeError:
                raise
            except Exception as error:  # pickles, archives, JSON and shapes, each with errors of its own
                raise RecipeError(f"resume_from_checkpoint: {checkpoint}: {first_line(error)}: {_ANOTHER}") from error

        return loading

    def load_optimizer(folder: str | None, load: Callable[..., Any] = trainer._load_optimizer_and_scheduler) -> None:
        load(folder)
        for state in () if trainer.is_deepspeed_enabled else trainer.optimizer.state.values():
            tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
            check_finite(tensors, f"resume_from_checkpoint: {checkpoint}: optimizer")

    trainer._load_optimizer_and_scheduler = load_optimizer
    for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state"):
        setattr(trainer, name, explained(getattr(trainer, name)))
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        if path.name == ADAPTER and is_peft_model(trainer.model):
            named = f"resume_from_checkpoint: {checkpoint}"
            check_adapter_complete(trainer.model, trainer.model.active_adapters[0], read_weights(path), named)
            continue
        for _ in each_weight(path):  # only looked at: a whole model is read by Transformers
            pass


@contextlib.contextmanager
def annotate_failure(trainer: Trainer) -> Iterator[None]:
    """Adds to a lack of memory, and to a Ctrl-C, when it came and what is kept; makes a message of a tracker's complaint."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        print(file=sys.stderr)  # below the bar of progress
        stopped = isinstance(error, KeyboardInterrupt)
        if stopped or lack_of_memory(error):
            state = trainer.state
            error.add_note(f"after {state.global_step} of {state.max_steps} steps")
            kept = max(filter(_is_whole, checkpoints_in(Path(trainer.args.output_dir))), key=step_of, default=None)
            if kept is not None:
                member = kept.parent.name.startswith("member-")  # of an ensemble, which goes on from no named one
                goes_on = f": `resume_from_checkpoint: {kept}` goes on from it, with the same `optim`"
                goes_on = ": `resume_from_checkpoint: true` goes on from it" if stopped else "" if member else goes_on
                error.add_note(f"{kept} is kept{goes_on}")
        elif complaint := complaint_of_tracker(error):
            raise complaint from error
        raise


def shutdown_distributed(trainer: Trainer, last: bool = True) -> None:
    """Waits for the other processes, and ends what they share if no other training follows in this process.

    A trainer that is let go right after its last exchange may hang on CPUs: whoever frees Gloo's group of processes holds the
    interpreter's lock and waits for Gloo's thread, which waits for that lock to free the last exchange. So it gets a moment.
    """
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.wait_for_everyone()
        time.sleep(0.5)
    if last:
        trainer.end()


def save_policy(trainer: Trainer) -> None:
    """Saves the model, or its adapter, with the generation config, which says by which token an answer ends.

    PEFT saves none beside an adapter, and the base's own may not know the EOS that was taught.
    """
    config = trainer.model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [trainer.processing_class.eos_token_id, *(end for end in ends if end is not None)]
    config.eos_token_id = list(dict.fromkeys(ends))
    save_result(trainer, config.save_pretrained)


def save_result(trainer: Trainer, save_more: Callable[[str], Any] | None = None) -> None:
    """Saves the model into the folder of the run: all of it is written there before anything of an earlier result goes.

    From when the first file is moved to its place until the record is written in the end, the folder has no `recipe.json`.

    Args:
        trainer: after training.
        save_more: what else the process that saves writes into the folder that it is given.
    """
    output = Path(trainer.args.output_dir)
    whole = output / _SAVING
    first = trainer.args.should_save
    if first:
        shutil.rmtree(whole, ignore_errors=True)  # of a run that was killed
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(whole), _internal_call=True)
        if save_more and first:
            save_more(str(whole))
    except Exception:
        shutil.rmtree(whole, ignore_errors=True)  # on a full disk it is in the way of others
        raise
    if first:
        if (output / RECIPE).exists():
            os.replace(output / RECIPE, output / PENDING)  # which knows what it cost, if this is that run
        # what an earlier run left, of the other sort or in other shards: together they would load as one
        _remove(output, *_WHOLE, *_ADAPTER)
        for path in whole.iterdir():
            if path.is_dir():
                shutil.rmtree(output / path.name, ignore_errors=True)
            os.replace(path, output / path.name)
        whole.rmdir()
    trainer.accelerator.wait_for_everyone()


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint; first of all that by which it is whole."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def remove_results(output: Path, *others: str) -> None:
    """Removes what an earlier run left in a folder: its model, whole or not, checkpoints, records and `others` (patterns)."""
    (output / RECIPE).unlink(missing_ok=True)
    for checkpoint in checkpoints_in(output):
        remove_checkpoint(checkpoint)
    _remove(output, *_WHOLE, *_ADAPTER, RECIPE, PENDING, LOG, *others)


def _remove(output: Path, *patterns: str) -> None:
    for path in [path for pattern in patterns for path in output.glob(pattern)]:
        path.unlink()


def evaluate_at_end(trainer: Trainer) -> None:
    """Evaluates the trained model, if there is anything to evaluate on and the last step was not evaluated already."""
    last = trainer.state.global_step
    done = any("eval_runtime" in entry and entry["step"] == last for entry in trainer.state.log_history)
    if trainer.eval_dataset is not None and not done:
        with annotate_failure(trainer):
            trainer.evaluate()


def check_writable(output: Path) -> None:
    """Says at the start what would otherwise be found out when the first checkpoint, or a report, is written.

    Raises:
        RecipeError: if the folder cannot be made, or nothing can be written into it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RecipeError(f"output_dir: {output}: cannot be written to ({error.strerror}): name another folder") from error


def refuse_unfinished(output: Path) -> None:
    """Refuses to start anew in a folder that holds checkpoints of a run that was not finished."""
    checkpoints = sorted(checkpoints_in(output), key=step_of)
    if checkpoints and not (output / RECIPE).exists():
        raise RecipeError(
            f"output_dir: {output} holds {checkpoints[-1].name} of an unfinished run: set `resume_from_checkpoint: true` to go "
            "on with it, or name another folder, or delete this one"
        )


def _check_same_run(checkpoint: Path, arguments: dict[str, Any]) -> None:
    path = checkpoint / ARGUMENTS
    made_with = read_json(path)
    # Through JSON, as what stands in the file went.
    now = json.loads(json.dumps(arguments, default=str))
    differences = [
        f"{key} {made_with[key]} then, {value} now" for key, value in now.items() if made_with.get(key, value) != value
    ]
    if differences:
        raise RecipeError(
            f"resume_from_checkpoint: {checkpoint} comes from a run with other arguments ({'; '.join(differences[:3])}): name "
            "another `output_dir`, or this checkpoint itself to go on from it all the same"
        )


def result_arguments(groups: Iterable[Any]) -> dict[str, Any]:
    """The arguments that the result of a run depends on."""
    values: dict[str, Any] = {}
    for group in groups:
        values |= group.to_dict() if isinstance(group, TrainingArguments) else asdict(group)
    return {key: value for key, value in values.items() if key not in _FREE and not key.startswith(_FREE_PREFIXES)}


def checkpoints_in(output: Path) -> list[Path]:
    """The folders of a run's checkpoints, in no order."""
    return [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def step_of(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_whole(checkpoint: Path) -> bool:
    """Whether all of a checkpoint is there; the trainer writes its state last, and a killed one may leave half of it."""
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    engines = ("optimizer*", "global_step*")  # of PyTorch and FSDP, of DeepSpeed
    patterns = (engines, ("rng_state*",), ("*.safetensors", "pytorch_model_fsdp*", "global_step*"))
    return all(any(found for pattern in group for found in checkpoint.glob(pattern)) for group in patterns)


def _last_metrics(trainer: Trainer) -> dict[str, float]:
    """The newest value of everything that was logged."""
    metrics: dict[str, float] = {}
    for entry in trainer.state.log_history:
        metrics.update(entry)
    return dict(sorted(metrics.items()))  # those of a checkpoint have this order
