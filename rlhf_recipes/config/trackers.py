"""Trackers (TRL's `report_to`): refused where they are not installed, and one run for each folder of results."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, causes, first_line

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

TRACKERS = {"trackio": ("trackio",), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Those that are tried here, and the packages of which one must be there; what else Transformers knows is passed on to it."""
_OF_TRANSFORMERS = "huggingface"  # its default for `project`


def settle_trackers(values: dict[str, Any], where: str) -> None:
    """Refuses trackers that are not there, and names the run: trackio would call each one anew, of a resumed training too.

    Args:
        values: arguments of a recipe; `report_to` becomes a list (on the command line, `trackio,wandb` is one), and `run_name`
            is set by `output_dir` where there is none.
        where: they come from, for messages.

    Raises:
        RecipeError: for a tracker that nobody knows, or one that is not installed.
    """
    wanted = values.get("report_to")
    names = wanted.replace(" ", "").split(",") if isinstance(wanted, str) else wanted or ["none"]
    values["report_to"] = names
    if names == ["none"]:
        return
    for name in names if names != ["all"] else ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = [*TRACKERS, *sorted(INTEGRATION_TO_CALLBACK.keys() - TRACKERS.keys())]
            raise RecipeError(f"{where}: report_to: {name!r} is none of {', '.join(known)}, all, none")
        if name in TRACKERS:
            _refuse_uninstalled(name, where)
    if values.get("output_dir"):
        values["run_name"] = values.get("run_name") or name_of_run(values["output_dir"])


def name_of_run(output_dir: str | Path) -> str:
    """What a folder's run is called in a tracker: of `runs/mine/seed-0/sft`, what is below `runs`: `mine-seed-0-sft`."""
    parts = [part for part in Path(output_dir).parts if part not in ("/", ".", "..")]
    below = parts[len(parts) - parts[::-1].index("runs") :] if "runs" in parts else parts[-2:]
    return "-".join(below or parts)


def begin_tracking(args: TrainingArguments) -> None:
    """Before a training: a run of its own in Weights & Biases, under `project`, which by itself only trackio reads."""
    if "wandb" not in args.report_to:
        return
    if args.project != _OF_TRANSFORMERS:
        os.environ["WANDB_PROJECT"] = args.project
    # An ensemble trains its members in one process, and the callback of the next would go on in the run of the one before
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def tracker_complaint(error: BaseException) -> str | None:
    """Return the message of a tracker that stopped a training, as one without a login does; None for any other error."""
    for cause in causes(error):
        package = type(cause).__module__.partition(".")[0]
        if package in TRACKERS:
            login = ": log in by `wandb login`, or set WANDB_MODE=offline" if package == "wandb" else ""
            return f"report_to: {package}: {first_line(cause)}{login}"
    return None


def _refuse_uninstalled(name: str, where: str) -> None:
    """Imports it, as the trainer will: a package may be there without what it needs."""
    reason = "is not installed"
    for package in TRACKERS[name]:
        try:
            # None: of a mere folder of that name, as the one that wandb keeps its runs in
            if importlib.import_module(package).__file__ is not None:
                return
        except ImportError as error:
            reason = reason if error.name == package else f"cannot be imported ({first_line(error)})"
    raise RecipeError(f"{where}: report_to: {name} {reason}: `pip install --upgrade {name}`, or set `report_to: none`")
