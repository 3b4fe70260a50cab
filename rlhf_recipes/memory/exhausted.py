"""When memory was not enough: one message with what the plan says of this run, and what to change."""

import os
import re
from collections.abc import Iterator

from rlhf_recipes.config.current import CurrentRun
from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.memory.autofit import advice, needed, smallest_card
from rlhf_recipes.memory.stages import GIB, Arguments, can_be_planned, plan_stage

import torch

_SIZE = r"([\d.]+ (?:[KMGTP]iB|bytes))"
_ASKED = re.compile(rf"(?:tried|Tried|Unable) to allocate {_SIZE}")
_FREE = re.compile(rf"of which {_SIZE} is free")
_LESS = 0.8  # of what a plan needs that should have fitted: where to look for what to change


def explain(error: BaseException, run: CurrentRun | None, when: str = "") -> str:
    """Return what was requested, what the plan of the run predicts, and what to change.

    Args:
        error: the error by which a GPU or the machine ran out of memory.
        run: the run of this process, or None if it is not known.
        when: the step of the training, such as " after 3 of 9 steps".
    """
    on_gpu = isinstance(error, torch.OutOfMemoryError) or any(name in str(error) for name in ("CUDA", "CUBLAS", "HIP", "XPU"))
    card = _card(on_gpu)
    stage = f"{run.recipe.stem}: " if run else ""
    whose = "the GPU's memory" if on_gpu else "this machine's memory (RAM)"
    size = f" of {card:.1f} GiB" if card else ""
    sentences = [f"{stage}{whose}{size} was not enough{when} ({_asked(error)})"]
    sentences += _remedies(run, card, on_gpu) if run else []
    return ". ".join(sentences)


def _asked(error: BaseException) -> str:
    asked, free = _ASKED.search(str(error)), _FREE.search(str(error))
    if asked is None:
        return first_line(error)
    return f"{asked[1]} were asked for" + (f", and {free[1]} were free" if free else "")


def _card(on_gpu: bool) -> float | None:
    """GiB of the GPU, or of the machine."""
    try:
        if on_gpu:
            return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    except (RuntimeError, AssertionError, ValueError, OSError):  # PyTorch without that GPU, and a system that does not say
        return None


def _remedies(run: CurrentRun, card: float | None, on_gpu: bool) -> Iterator[str]:
    recipe, values = run.recipe.stem, run.values
    if not on_gpu and torch.cuda.is_available() and not values.get("use_cpu"):
        yield "Weights pass through it on their way to the GPU: end what else takes it, or set `dtype: bfloat16`"
        return
    if not can_be_planned(recipe):
        four = "`load_in_4bit: true`, " if values.get("load_in_4bit") is False and recipe != "merge" else ""
        yield f"What helps: {four}a smaller base, or a machine with more of it"
        return
    try:
        yield _planned(Arguments(recipe, recipe, values, triton=on_gpu), card)
    except Exception as error:  # the plan must not hide what it is asked about
        reason = f": {first_line(error)}" if isinstance(error, RecipeError) else ""
        yield f"There is no plan for it{reason}. What helps first: smaller micro-batches, `gradient_checkpointing: true`"
        return
    yield f"More: `python {run.recipe.parent / 'plan.py'} --config {run.config} --recipe {recipe}`"


def _planned(arguments: Arguments, card: float | None) -> str:
    plan = plan_stage(arguments)
    predicted = f"By its plan it needs {needed(plan)} (at its peak, {plan.worst})"
    less = (smallest_card(plan) or 0.0) * _LESS
    if card is None or not plan.fits(card):
        return f"{predicted}. To make it fit: {'; '.join(advice(arguments, card or less))}"
    changes = "; ".join(advice(arguments, less))
    return f"{predicted}, which would fit: look what else takes memory there. If nothing does, the plan is wrong: {changes}"
