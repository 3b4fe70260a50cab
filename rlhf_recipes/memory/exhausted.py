"""When memory was not enough: one message with what the plan says of this run, and what to change."""

import os
import re
from collections.abc import Iterator, Sequence

from rlhf_recipes.config.parser import Launched
from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.memory.autofit import advice, needed, smallest_card
from rlhf_recipes.memory.stages import GIB, Arguments, can_be_planned, plan_stage

import torch

_SIZE = r"([\d.]+ (?:[KMGTP]iB|bytes))"
_ASKED = re.compile(rf"(?:tried|Tried|Unable) to allocate {_SIZE}")
_FREE = re.compile(rf"of which {_SIZE} is free")
_LESS = 0.8  # of what a plan needs that should have fitted: where to look for what to change


def explain(error: BaseException, launched: Launched | None, notes: Sequence[str] = ()) -> str:
    """What was asked for, what the plan makes of it, and what is left to go on from.

    Args:
        error: by which a GPU or the machine said that it has no memory left.
        launched: what ran, or None where that is not known.
        notes: when it happened, as `rlhf_recipes.training.run` adds it.
    """
    on_gpu = isinstance(error, torch.OutOfMemoryError) or any(name in str(error) for name in ("CUDA", "CUBLAS", "HIP", "XPU"))
    card = _card(on_gpu)
    stage = f"{launched.recipe.stem}: " if launched else ""
    whose = "the GPU's memory" if on_gpu else "this machine's memory (RAM)"
    size = f" of {card:.1f} GiB" if card else ""
    sentences = [f"{stage}{whose}{size} was not enough{''.join(f' {note}' for note in notes[:1])} ({_asked(error)})"]
    sentences += _remedies(launched, card, on_gpu) if launched else []
    return ". ".join([*sentences, *notes[1:]])


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


def _remedies(launched: Launched, card: float | None, on_gpu: bool) -> Iterator[str]:
    recipe, values = launched.recipe.stem, launched.values
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
    yield f"More: `python {launched.recipe.parent / 'plan.py'} --config {launched.config} --recipe {recipe}`"


def _planned(arguments: Arguments, card: float | None) -> str:
    plan = plan_stage(arguments)
    predicted = f"By its plan it needs {needed(plan)} (at its peak, {plan.worst})"
    less = (smallest_card(plan) or 0.0) * _LESS
    if card is None or not plan.fits(card):
        return f"{predicted}. To make it fit: {'; '.join(advice(arguments, card or less))}"
    changes = "; ".join(advice(arguments, less))
    return f"{predicted}, which would fit: look what else takes memory there. If nothing does, the plan is wrong: {changes}"
