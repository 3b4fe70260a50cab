"""Save what a run has trained."""

import os
import shutil
from pathlib import Path

from rlhf_recipes.core.files import LOG, PENDING, RECIPE
from rlhf_recipes.training.resume import remove_checkpoints

from transformers import Trainer

_MODEL = ("config.json", "model*.safetensors*", "adapter_config.json", "adapter_model*.safetensors")
_SAVING = ".saving"  # folder in the output folder, until all of the result is written


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
    config.eos_token_id = list(
        dict.fromkeys(token for token in (trainer.processing_class.eos_token_id, *eos) if token is not None)
    )
    config.save_pretrained(folder)


def remove_results(output: Path, *others: str) -> None:
    """Remove an earlier run's record, checkpoints, model and log, and `others`."""
    (output / RECIPE).unlink(missing_ok=True)
    remove_checkpoints(output)
    _remove(output, *_MODEL, PENDING, LOG, *others)


def _remove(output: Path, *patterns: str) -> None:
    for path in [path for pattern in patterns for path in output.glob(pattern)]:
        path.unlink()
