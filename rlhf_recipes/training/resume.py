"""Checkpoints to resume from: complete ones, of a run with the same arguments."""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line, lack_of_memory
from rlhf_recipes.core.files import RECIPE, check_writable, read_json

from accelerate import PartialState
from transformers import TrainerState, TrainingArguments

ARGUMENTS = "arguments.json"
"""File of a checkpoint with the arguments of its run."""
TRAINER_STATE = "trainer_state.json"
"""File of a checkpoint that the trainer writes last."""

# Arguments that may differ between a run and the one that resumes it. All others change the result.
RESUME_IGNORED = ("output_dir", "resume_from_checkpoint", "max_steps", "num_train_epochs", "report_to", "run_name")
RESUME_IGNORED += ("needs", "disable_tqdm", "ensemble_combine", "uncertainty_coef", "demonstrations")
_IGNORED_PREFIXES = ("logging_", "log_", "save_", "eval_", "per_device_eval_", "push_", "hub_", "trackio_", "project")


def checkpoint_to_resume(*arguments: Any) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` means, or None.

    `true` means the newest complete checkpoint of `output_dir`, if there is one. It must come from a run with the same
    arguments, apart from those that do not change the result. A checkpoint that is named may come from any run.

    Args:
        arguments: the dataclasses of the recipe; one is the trainer's.

    Raises:
        RecipeError: if the named checkpoint is incomplete, the newest one was made with other arguments, or a run would start
            over in the folder of an unfinished one.
    """
    training = next(group for group in arguments if isinstance(group, TrainingArguments))
    wanted, output = training.resume_from_checkpoint, Path(training.output_dir)
    check_writable(output)
    if wanted in (None, False, "false", "False"):
        refuse_unfinished(output)
        if (output / RECIPE).exists():
            PartialState().print(f"{output} holds a finished run, which this one will replace")
        return None
    if wanted not in (True, "true", "True"):
        if not is_complete(Path(wanted)):
            raise RecipeError(
                f"resume_from_checkpoint: {wanted}: not a complete checkpoint (weights, optimizer and trainer state). "
                "Fix: name another, or set `true` for the newest complete one"
            )
        return wanted
    newest = newest_checkpoint(output)
    if newest is None:
        return None
    _check_same_run(newest, result_arguments(arguments))
    return str(newest)


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Return the trainer state of a checkpoint.

    Raises:
        RecipeError: if it is damaged.
    """
    path = checkpoint / TRAINER_STATE
    with resume_errors(path):
        return TrainerState.load_from_json(str(path))


@contextlib.contextmanager
def resume_errors(path: str | Path | None) -> Iterator[None]:
    """Turn what a damaged checkpoint raises within into one message that names it.

    Transformers reads the pickles of a checkpoint with `weights_only`, so damaged ones run no code.

    Args:
        path: the checkpoint, or the file in it that is read.
    """
    try:
        yield
    except Exception as error:  # pickles, archives, JSON and shapes each have errors of their own
        if isinstance(error, RecipeError) or lack_of_memory(error):
            raise
        raise RecipeError(
            f"resume_from_checkpoint: {path}: {first_line(error)}. Fix: resume from another checkpoint, or start over"
        ) from error


def refuse_unfinished(output: Path) -> None:
    """Refuse to start over in a folder that holds checkpoints of an unfinished run.

    Raises:
        RecipeError: if it does.
    """
    checkpoints = sorted(checkpoints_in(output), key=step_of)
    if checkpoints and not (output / RECIPE).exists():
        raise RecipeError(
            f"output_dir: {output} holds {checkpoints[-1].name} of an unfinished run. Fix: set `resume_from_checkpoint: true`, "
            "or name another folder, or delete this one"
        )


def _check_same_run(checkpoint: Path, arguments: dict[str, Any]) -> None:
    saved = read_json(checkpoint / ARGUMENTS)
    arguments = json.loads(json.dumps(arguments, default=str))  # as JSON has changed the saved ones
    differences = [
        f"{key}: {saved[key]} then, {value} now" for key, value in arguments.items() if saved.get(key, value) != value
    ]
    if differences:
        raise RecipeError(
            f"resume_from_checkpoint: {checkpoint} is of a run with other arguments ({'; '.join(differences[:3])}). Fix: name "
            "another `output_dir`, or name this checkpoint to resume from it all the same"
        )


def result_arguments(arguments: Iterable[Any]) -> dict[str, Any]:
    """Return the arguments that change the result of a run, of all its dataclasses."""
    values: dict[str, Any] = {}
    for group in arguments:
        values |= group.to_dict() if isinstance(group, TrainingArguments) else asdict(group)
    return {key: value for key, value in values.items() if key not in RESUME_IGNORED and not key.startswith(_IGNORED_PREFIXES)}


def checkpoints_in(output: Path) -> list[Path]:
    """Return the checkpoints of a run, complete or not, in no order."""
    return [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def newest_checkpoint(output: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    return max(filter(is_complete, checkpoints_in(output)), key=step_of, default=None)


def remove_checkpoints(output: Path) -> None:
    """Delete all checkpoints of a run."""
    for checkpoint in checkpoints_in(output):
        remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, its state file first: half of one is not complete."""
    (checkpoint / TRAINER_STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step at which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint has state, optimizer, random state and weights."""
    try:
        json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    optimizer = ("optimizer*", "global_step*")  # of PyTorch and FSDP, of DeepSpeed
    patterns = (optimizer, ("rng_state*",), ("*.safetensors", "pytorch_model_fsdp*", "global_step*"))
    return all(any(path for pattern in group for path in checkpoint.glob(pattern)) for group in patterns)
