"""What a run leaves beside its result: `recipe.json`; and where an interrupted run goes on."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf_recipes.config.current import set_trainer
from rlhf_recipes.config.trackers import begin_tracking
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import PENDING, RECIPE
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.training.record import RunRecorder, write_log
from rlhf_recipes.training.resume import (
    checkpoints_in,
    read_trainer_state,
    remove_checkpoint,
)

from accelerate import PartialState
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
    set_trainer(trainer)
    begin_tracking(trainer.args)
    recorders = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, RunRecorder)]
    trainer.run_arguments = recorders[0].arguments if recorders else None
    if checkpoint:
        state, args = read_trainer_state(Path(checkpoint)), trainer.args
        done = state.global_step >= args.max_steps if args.max_steps > 0 else state.epoch >= args.num_train_epochs
        if done:
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            trainer._load_rng_state(checkpoint)
            if trainer.is_world_process_zero():
                write_log(trainer.args, state)
            if not any("train_loss" in entry for entry in state.log_history):
                trainer.log_missing_summary()
            return
    trainer.train(resume_from_checkpoint=checkpoint)


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
