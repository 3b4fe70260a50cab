"""Batches, steps and lengths for the rows that there are."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlhf_recipes.pipeline.init.data import DataFile
from rlhf_recipes.pipeline.init.model import Model

_STEPS = 40  # fewer than these teach little, so small data are read several times
_MOST_EPOCHS = 5
_FEW = 200  # rows, of which none should be lost


@dataclass(frozen=True)
class Lengths:
    """Tokens of a whole row, a prompt and an answer."""

    whole: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class Training:
    """Rows and steps of a stage that trains.

    Parameters:
        batch: rows of an optimizer step.
        epochs: passes over the data.
        steps: optimizer steps.
        held_out: rows for the loss during training.
        warmup: steps in which the learning rate rises; in PPO those in which only the critic learns.
        evaluate: steps between evaluations.
        log: steps between logged numbers.
    """

    batch: int
    epochs: int
    steps: int
    held_out: int
    warmup: int
    evaluate: int
    log: int


def choose_lengths(files: Sequence[DataFile], model: Model, on_gpu: bool) -> Lengths:
    """Return lengths that hold 95% of the rows, or all of few.

    Model and machine may allow less.
    """
    context = model.context or 1 << 20
    answer = min(_most(files, "answer", 256 if on_gpu else 64), 256 if on_gpu else 128, max(1, context // 2))
    prompt = min(max(32, _most(files, "prompt", 256)), 512, context - answer)
    whole = min(max(64, _most(files, "whole", 256)), 1024 if on_gpu else 512, context)
    return Lengths(whole, prompt, answer)


def too_long(file: DataFile, lengths: Lengths) -> tuple[int, int]:
    """Return how many rows of the sample are too long, and its size."""
    sampled = file.lengths["whole"] or file.lengths["prompt"]
    most = lengths.whole if file.lengths["whole"] else lengths.prompt
    return sum(length > most for length in sampled), len(sampled)


def plan_training(rows: int, prompts: int) -> Training:
    """Return the sizes of SFT, of a reward model or of DPO.

    Args:
        rows: those to train and evaluate on.
        prompts: how many prompts they have, by which pairs are held out.
    """
    held_out = max(1, min(100, prompts // 10))
    rows = max(1, rows - held_out)
    batch = _power_of_two(rows / 10, most=16)
    each = math.ceil(rows / batch)
    epochs = max(1, min(_MOST_EPOCHS, math.ceil(_STEPS / each)))
    return _training(batch, epochs, epochs * each, held_out, most_warmup=50)


def plan_ppo(prompts: int) -> Training:
    """Return the sizes of PPO, of which each batch is learned from twice."""
    held_out = max(1, min(50, prompts // 10))
    prompts = max(1, prompts - held_out)
    batch = _power_of_two(prompts / 3, most=16)
    steps = max(_STEPS, min(2000, 2 * math.ceil(prompts / batch)))
    return _training(batch, 1, steps, held_out, most_warmup=20)


def _training(batch: int, epochs: int, steps: int, held_out: int, most_warmup: int) -> Training:
    warmup = min(most_warmup, steps // 10)
    return Training(batch, epochs, steps, held_out, warmup, max(1, min(200, steps // 4)), max(1, min(10, steps // 20)))


def _power_of_two(value: float, most: int) -> int:
    return 2 ** int(math.log2(max(1, min(value, most))))


def _most(files: Iterable[DataFile], name: str, default: int) -> int:
    """Return the greatest length of 95% of the rows, or of few, in steps of 16."""
    lengths = sorted(length for file in files for length in file.lengths[name])
    if not lengths:
        return default
    longest = lengths[int(0.95 * (len(lengths) - 1))] if len(lengths) > _FEW else lengths[-1]
    return 16 * math.ceil((longest + 2) / 16)  # and EOS
