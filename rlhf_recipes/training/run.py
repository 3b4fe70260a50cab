"""What a run leaves beside its result: `recipe.json`; and where an interrupted run goes on."""

import contextlib
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.config.trackers import begin_tracking, complaint_of_tracker
from rlhf_recipes.core.errors import RecipeError, first_line, lack_of_memory
from rlhf_recipes.core.files import PENDING, RECIPE
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.models.adapters import check_adapter_complete
from rlhf_recipes.models.weights import ADAPTER, check_finite, iterate_weights, read_weights
from rlhf_recipes.training.counters import ResumeCounters
from rlhf_recipes.training.record import RunRecorder, write_log
from rlhf_recipes.training.resume import (
    OTHER_CHECKPOINT,
    checkpoints_in,
    is_complete,
    read_trainer_state,
    remove_checkpoint,
    step_of,
)

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from transformers import Trainer


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
        state, args = read_trainer_state(Path(checkpoint)), trainer.args
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
                raise RecipeError(f"resume_from_checkpoint: {checkpoint}: {first_line(error)}: {OTHER_CHECKPOINT}") from error

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
        for _ in iterate_weights(path):  # only looked at: a whole model is read by Transformers
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
            kept = max(filter(is_complete, checkpoints_in(Path(trainer.args.output_dir))), key=step_of, default=None)
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
