"""Checkpoints to resume from: which are complete, and of the same run."""

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
STATE = "trainer_state.json"  # of a checkpoint, written last
OTHER_CHECKPOINT = "resume from another checkpoint, or start over"
# What may differ between a run and the one that goes on from its checkpoint; all else decides the result.
RESUME_IGNORED = (
    "output_dir",
    "resume_from_checkpoint",
    "max_steps",
    "num_train_epochs",
    "report_to",
    "run_name",
    "disable_tqdm",
)
RESUME_IGNORED += ("ensemble_combine", "uncertainty_coef", "demonstrations")
_IGNORED_PREFIXES = ("logging_", "log_", "save_", "eval_", "per_device_eval_", "push_", "hub_", "trackio_", "project")


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
        if not is_complete(Path(wanted)):
            raise RecipeError(f"resume_from_checkpoint: {wanted} is not a whole checkpoint (trainer state and optimizer)")
        return wanted
    newest = max(filter(is_complete, checkpoints_in(output)), key=step_of, default=None)
    if newest is not None:
        _check_same_run(newest, result_arguments((training, *arguments)))
    return str(newest) if newest else None


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Return the trainer state of a checkpoint.

    Raises:
        RecipeError: if it is damaged.
    """
    path = checkpoint / STATE
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
        raise RecipeError(f"resume_from_checkpoint: {path}: {first_line(error)}. Fix: {OTHER_CHECKPOINT}") from error


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint; first of all that by which it is whole."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


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
    return {key: value for key, value in values.items() if key not in RESUME_IGNORED and not key.startswith(_IGNORED_PREFIXES)}


def checkpoints_in(output: Path) -> list[Path]:
    """The folders of a run's checkpoints, in no order."""
    return [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def step_of(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_complete(checkpoint: Path) -> bool:
    """Whether all of a checkpoint is there; the trainer writes its state last, and a killed one may leave half of it."""
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    engines = ("optimizer*", "global_step*")  # of PyTorch and FSDP, of DeepSpeed
    patterns = (engines, ("rng_state*",), ("*.safetensors", "pytorch_model_fsdp*", "global_step*"))
    return all(any(found for pattern in group for found in checkpoint.glob(pattern)) for group in patterns)
