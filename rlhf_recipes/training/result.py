"""Save what a run has trained, evaluated at its end."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_recipes.core.files import LOG, PENDING, RECIPE
from rlhf_recipes.training.resume import checkpoints_in, remove_checkpoint

from transformers import Trainer

# What is left of a model that was trained whole, and of an adapter.
_WHOLE = ("config.json", "model*.safetensors*")
_ADAPTER = ("adapter_config.json", "adapter_model*.safetensors")
_SAVING = ".saving"
"""Of a result that is not in its place yet, beside it."""


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
        trainer.evaluate()
