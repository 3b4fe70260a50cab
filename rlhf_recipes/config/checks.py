"""Reject values that would fail late, or make a run silently wrong."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, did_you_mean, first_line

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

_EXCLUSIVE = (
    ("load_in_4bit", "load_in_8bit", "set one of the two"),
    ("reward_funcs", "reward_weights", "write `weight` in the entries of `reward_funcs`"),
)
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "pad_to_multiple_of": 1,
    "num_train_epochs": 0,
    "weight_decay": 0,
}
TRACKERS = {"trackio": ("trackio",), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""The tested trackers, each with the packages that provide it. Transformers knows others."""


def check_values(values: dict[str, Any], trains: bool) -> None:
    """Reject values that exclude each other, or that libraries ignore or fail on.

    Raises:
        RecipeError: with the key and the fix.
    """
    for key, other, fix in _EXCLUSIVE:
        if values.get(key) and values.get(other):
            raise RecipeError(f"`{key}` and `{other}` exclude each other. Fix: {fix}")
    if trains and (values.get("load_in_4bit") or values.get("load_in_8bit")) and not values.get("use_peft"):
        raise RecipeError("use_peft: quantized weights cannot be trained. Fix: set `use_peft: true`")
    if trains and values.get("sync_ref_model") and values.get("use_peft"):
        raise RecipeError("sync_ref_model: with LoRA the reference is a frozen adapter or the base. Fix: set it to false")
    if values.get("eval_packing") and not values.get("packing"):
        raise RecipeError("eval_packing: without `packing`, packed rows would read each other. Fix: leave it out")
    if values.get("num_train_epochs") == 0 and values.get("max_steps", -1) <= 0:
        raise RecipeError("num_train_epochs: 0: no step would be trained. Fix: set it above 0, or set `max_steps`")
    if values.get("max_steps") == 0:
        raise RecipeError("max_steps: 0: no step would be trained. Fix: set it above 0, or -1 for `num_train_epochs`")
    for key, least in _LEAST.items():
        if values.get(key) is not None and values[key] < least:
            raise RecipeError(f"{key}: {values[key]}: must be {least} or more")
    if trains and (rate := values.get("learning_rate")) is not None and not rate >= 0:
        raise RecipeError(f"learning_rate: {rate}: nothing would be learnt. Fix: set it above 0")
    if values.get("hub_strategy") in ("checkpoint", "all_checkpoints"):
        raise RecipeError(f"hub_strategy: {values['hub_strategy']}: only complete results are uploaded. Fix: leave it out")
    if values.get("truncation_mode") == "keep_end":
        raise RecipeError("truncation_mode: keep_end: cuts off prompts. Fix: raise `max_length`, or set `long_rows: drop`")
    if (column := values.get("dataset_text_field", "text")) != "text":
        raise RecipeError(f"dataset_text_field: {column}: is not read. Fix: set `column_mapping: {{{column}: text}}`")


def check_process_group(groups: Sequence[Any]) -> None:
    """Reject a launch whose processes would not form one group.

    Each would train alone, and overwrite the others.

    Raises:
        RecipeError: with the fix.
    """
    launched = os.environ.get("WORLD_SIZE", "") if "LOCAL_RANK" in os.environ else ""  # set by torchrun
    alone = any(group.world_size == 1 for group in groups if isinstance(group, TrainingArguments))
    if alone and launched.isdecimal() and int(launched) > 1:
        reason = "this one knows of no other" if torch.cuda.is_available() else "there is no GPU to share out"
        raise RecipeError(f"{launched} processes were launched, and {reason}. Fix: set `use_cpu: true`, or launch one")


# --- Number types --------------------------------------------------------------------------------------------


def set_machine_defaults(values: dict[str, Any]) -> None:
    """Turn off the defaults that this machine does not support, such as bf16."""
    if not torch.accelerator.is_available() or values.get("use_cpu"):
        values.setdefault("bf16", False)
        values.setdefault("dataloader_pin_memory", False)
    elif not _has_bf16():
        values.setdefault("bf16", False)


def check_machine(values: dict[str, Any]) -> None:
    """Reject number types that this machine lacks: emulated bf16 is silently slow.

    Raises:
        RecipeError: with the key and the fix.
    """
    if values.get("use_cpu"):
        return
    for key in ("bf16", "fp16", "activation_offloading"):
        if values.get(key) and not torch.accelerator.is_available():
            raise RecipeError(f"{key}: this machine has no GPU. Fix: set `{key}: false`")
    for key in ("bf16", "dtype"):
        if values.get(key) in (True, "bfloat16") and not _has_bf16():
            raise RecipeError(
                f"{key}: {str(values[key]).lower()}: this GPU ({torch.cuda.get_device_name()}) has no bf16. Fix: set "
                "`bf16: false`, and with LoRA `dtype: float16` and `fp16: true`; without LoRA, and for PPO, `dtype: float32`"
            )


def _has_bf16() -> bool:
    """Return False for a CUDA GPU that would only emulate bf16."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


# --- Trackers ------------------------------------------------------------------------------------------------


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
