"""One run of a training stage: resume, train, evaluate, save, record and publish."""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf_recipes.config.current import set_trainer
from rlhf_recipes.core.errors import RecipeError, one_line
from rlhf_recipes.core.files import PENDING
from rlhf_recipes.export.upload import publish
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.loading import strip_consumed_arguments
from rlhf_recipes.stages import find_stage
from rlhf_recipes.training.dependencies import run_dependencies
from rlhf_recipes.training.result import RunRecorder, finish_record, save_result, write_log, write_record
from rlhf_recipes.training.resume import checkpoint_to_resume, remove_checkpoints, result_arguments

from accelerate.utils import is_peft_model
from transformers import Trainer, TrainingArguments


class Run:
    """One run of a training stage: a context in which the recipe calls `fit`.

    Entering it finds the checkpoint to resume from, and runs the stages that the YAML file names in `needs`. Leaving it writes
    `recipe.json`, which marks the stage as done, and uploads the result.

    Parameters:
        recipe: the recipe's `__file__`.
        arguments: its dataclasses; one of them is the trainer's.
        inputs: folders of earlier stages that it reads; None and other names are left out.

    Attributes:
        training_args: the trainer's arguments as parsed.
        trainer_args: those to make the trainer with.
    """

    def __init__(self, recipe: str, *arguments: Any, inputs: Iterable[str | Path | None] = ()):
        self.recipe, self.arguments, self.inputs = Path(recipe), arguments, [*filter(None, inputs)]
        self.training_args = next(group for group in arguments if isinstance(group, TrainingArguments))
        self.trainer_args = strip_consumed_arguments(self.training_args)
        self.output = Path(self.training_args.output_dir)
        self.stage = find_stage(self.recipe.stem)
        self.checkpoint: str | None = None
        self.trainer: Trainer | None = None

    def __enter__(self) -> "Run":
        self.checkpoint = checkpoint_to_resume(*self.arguments)
        run_dependencies(self.recipe, self.arguments)
        return self

    def fit(self, trainer: Trainer, report: dict[str, Any]) -> None:
        """Train, evaluate and save.

        Args:
            trainer: one of ours, made with `trainer_args`.
            report: what `load_data` and `check_rendered` report, for the record.
        """
        self.trainer = trainer
        set_trainer(trainer)
        base = fingerprint(trainer.model) if is_peft_model(trainer.model) else None  # FSDP will leave no whole weights
        recorder = RunRecorder()
        trainer.add_callback(recorder)
        trainer.run_arguments = result_arguments(self.arguments)
        trainer.check_before_training()
        self._remove_earlier()
        begin_tracking(trainer.args)
        try:
            trainer.train(resume_from_checkpoint=self.checkpoint)
        except ImportError as error:  # a package of kernels
            raise RecipeError(f"{self.recipe.stem}: {one_line(error)}") from error
        if not trainer.state.global_step:
            raise RecipeError("max_steps: no step was trained. Fix: set it or `num_train_epochs` higher, or name more rows")
        if trainer.is_world_process_zero():
            write_log(trainer.args, trainer.state)  # of a checkpoint of the last step, no callback has
        evaluated = any(
            "eval_runtime" in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history
        )
        if trainer.eval_dataset is not None and not evaluated:
            trainer.evaluate()
        save_result(trainer, is_policy=self.stage.output == "policy")
        if trainer.is_world_process_zero():
            parents = [str(folder) for folder in self.inputs if Path(folder).is_dir()]
            write_record(trainer, recorder, self.arguments, self.recipe.stem, base, parents, report)

    def _remove_earlier(self) -> None:
        """Remove checkpoints of an earlier run."""
        if self.checkpoint is None and self.trainer.is_world_process_zero():
            (self.output / PENDING).unlink(missing_ok=True)
            remove_checkpoints(self.output)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self._finish()

    def _finish(self) -> None:
        if self.trainer.is_world_process_zero():
            finish_record(self.training_args)
            self._announce()
        shutdown_distributed(self.trainer)
        publish(self.training_args)

    def _announce(self) -> None:
        print(f"The {self.stage.output} is in {self.output}")


def begin_tracking(args: TrainingArguments) -> None:
    """Set up Weights & Biases for a training: its `project`, and a run of its own."""
    if "wandb" not in args.report_to:
        return
    if args.project != "huggingface":  # Transformers' default
        os.environ["WANDB_PROJECT"] = args.project
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:  # of the member of an ensemble before this one
        wandb.finish()


def shutdown_distributed(trainer: Trainer, last: bool = True) -> None:
    """Wait for the other processes, and end their group after the last training.

    A trainer that is released right after its last exchange may hang on CPUs: the thread that frees Gloo's group holds the
    interpreter's lock and waits for Gloo's thread, which waits for that lock to free the exchange. So it gets a moment.
    """
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.wait_for_everyone()
        time.sleep(0.5)
    if last:
        trainer.end()
