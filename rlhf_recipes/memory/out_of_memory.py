"""The out-of-memory message: what the plan predicts, and what to change."""

import os
import re
from collections.abc import Iterator

from rlhf_recipes.config.current import CurrentRun
from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.memory.autofit import advice, needed
from rlhf_recipes.memory.gpu_arguments import StageArguments
from rlhf_recipes.memory.plan import GIB
from rlhf_recipes.memory.planners import has_planner, plan_stage

import torch

_SIZE = r"([\d.]+ (?:[KMGTP]iB|bytes))"
_REQUESTED = re.compile(rf"(?:tried|Tried|Unable) to allocate {_SIZE}")
_FREE = re.compile(rf"of which {_SIZE} is free")
_SAFER_SHARE = 0.8  # of the card that a plan predicts, where the prediction was too low


def explain_out_of_memory(error: BaseException, run: CurrentRun | None, when: str = "") -> str:
    """Return the request that failed, the prediction of the plan, and what to change.

    `when` is the step of the training, such as " after 3 of 9 steps".
    """
    text = str(error)
    on_gpu = isinstance(error, torch.OutOfMemoryError) or any(name in text for name in ("CUDA", "CUBLAS", "HIP", "XPU"))
    total = _total_memory(on_gpu)
    memory = "the GPU's memory" if on_gpu else "this machine's memory (RAM)"
    size = f" of {total:.1f} GiB" if total else ""
    requested, free = _REQUESTED.search(text), _FREE.search(text)
    request = f"requested: {requested[1]}" + (f", free: {free[1]}" if free else "") if requested else first_line(error)
    problem = f"{memory}{size} was not enough{when} ({request})"
    return ". ".join([f"{run.recipe.stem}: {problem}", *_remedies(run, total, on_gpu)]) if run else problem


def _total_memory(on_gpu: bool) -> float | None:
    """Return the GiB of the GPU or the machine; None if the system does not report it."""
    try:
        if on_gpu:
            return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    except (RuntimeError, AssertionError, ValueError, OSError):
        return None


def _remedies(run: CurrentRun, total: float | None, on_gpu: bool) -> Iterator[str]:
    recipe, values = run.recipe.stem, run.values
    if not on_gpu and torch.cuda.is_available() and not values.get("use_cpu"):
        yield "Weights pass through RAM on their way to the GPU. Fix: stop other programs, or set `dtype: bfloat16`"
        return
    if not has_planner(recipe):
        quantise = "`load_in_4bit: true`, " if values.get("load_in_4bit") is False and recipe != "merge" else ""
        yield f"Fix: {quantise}a smaller base, or a machine with more memory"
        return
    try:
        yield _planned(StageArguments(recipe, recipe, values, on_gpu=on_gpu), total)
    except Exception as error:  # a failing plan must not hide the lack of memory
        reason = f" ({first_line(error)})" if isinstance(error, RecipeError) else ""
        yield f"It has no memory plan{reason}. Fix: smaller micro-batches, `gradient_checkpointing: true`"
        return
    yield f"More: `python {run.recipe.parent / 'plan.py'} --config {run.config} --recipe {recipe}`"


def _planned(arguments: StageArguments, total: float | None) -> str:
    plan = plan_stage(arguments)
    predicted = f"The plan predicts {needed(plan)} (peak: {plan.worst})"
    safer = (plan.smallest_card or 0.0) * _SAFER_SHARE
    if total is None or not plan.fits(total):
        return f"{predicted}. Fix: {advice(arguments, total or safer)}"
    return f"{predicted}, which should fit. Fix: stop other programs on it; if there are none, {advice(arguments, safer)}"
