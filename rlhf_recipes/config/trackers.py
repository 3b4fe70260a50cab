"""Trackers (`report_to`): checked before the run, one run for each output folder."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, causes, did_you_mean, first_line

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

TRACKERS = {"trackio": ("trackio",), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""The tested trackers, each with the packages that provide it. Transformers knows others."""
_DEFAULT_PROJECT = "huggingface"  # Transformers' default for `project`


def prepare_trackers(values: dict[str, Any]) -> None:
    """Check that the trackers are installed, and name the run, also when it resumes.

    Args:
        values: keys and values of a recipe. `report_to` becomes a list; `run_name` is set from `output_dir`.

    Raises:
        RecipeError: for a tracker that is unknown or not installed.
    """
    wanted = values.get("report_to")
    names = wanted.replace(" ", "").split(",") if isinstance(wanted, str) else wanted or ["none"]
    values["report_to"] = names
    if names == ["none"]:
        return
    for name in names if names != ["all"] else ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = [*TRACKERS, *sorted(INTEGRATION_TO_CALLBACK.keys() - TRACKERS.keys()), "all", "none"]
            raise RecipeError(f"report_to: {name!r} is none of {', '.join(known)}{did_you_mean(name, known)}")
        if name in TRACKERS:
            _check_installed(name)
    if values.get("output_dir"):
        values["run_name"] = values.get("run_name") or run_name(values["output_dir"])


def run_name(output_dir: str | Path) -> str:
    """Return the name of a folder's run: `mine-seed-0-sft` for `runs/mine/seed-0/sft`."""
    parts = [part for part in Path(output_dir).parts if part not in ("/", ".", "..")]
    below = parts[len(parts) - parts[::-1].index("runs") :] if "runs" in parts else parts[-2:]
    return "-".join(below or parts)


def begin_tracking(args: TrainingArguments) -> None:
    """Set up Weights & Biases for a training: its `project`, and a run of its own."""
    if "wandb" not in args.report_to:
        return
    if args.project != _DEFAULT_PROJECT:
        os.environ["WANDB_PROJECT"] = args.project
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:  # of the member of an ensemble before this one
        wandb.finish()


def tracker_complaint(error: BaseException) -> str | None:
    """Return the message of a tracker that stopped a training, or None."""
    for cause in causes(error):
        package = type(cause).__module__.partition(".")[0]
        if package in TRACKERS:
            fix = ". Fix: log in with `wandb login`, or set WANDB_MODE=offline" if package == "wandb" else ""
            return f"report_to: {package}: {first_line(cause)}{fix}"
    return None


def _check_installed(name: str) -> None:
    """Import a tracker as the trainer will: its own dependencies may be missing."""
    reason = "is not installed"
    for package in TRACKERS[name]:
        try:
            # A mere folder of that name, such as the one with wandb's runs, has no file
            if importlib.import_module(package).__file__ is not None:
                return
        except ImportError as error:
            reason = reason if error.name == package else f"cannot be imported ({first_line(error)})"
    raise RecipeError(f"report_to: {name} {reason}. Fix: `pip install --upgrade {name}`, or set `report_to: none`")
