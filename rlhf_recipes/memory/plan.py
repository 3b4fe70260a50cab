"""A stage's memory plan, the cards that fit it, and plans as text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

GIB = 2**30
OVERHEAD = 0.75 * GIB
"""Memory besides tensors: the CUDA context, its kernels, workspaces of cuBLAS and bitsandbytes. Assumed, not measured."""
SPARE = 0.05
"""The share of a card that is left for fragmentation and a screen. Assumed, not measured."""
CARDS = (6, 8, 10, 12, 16, 24, 32, 48, 80)
"""GiB of common cards."""

QUANTISED, UNQUANTISED, ADAPTERS, GRADIENTS = "weights, quantised", "weights, others", "adapters", "gradients"
OPTIMIZER, MODELS = "optimizer", "further models"
CACHE, ACTIVATIONS, LOGITS, DEQUANTISED, BATCH = "KV cache", "activations", "logits", "a matrix, dequantised", "the batch"
COMPONENTS = (QUANTISED, UNQUANTISED, ADAPTERS, MODELS, GRADIENTS, OPTIMIZER, CACHE, ACTIVATIONS, LOGITS, DEQUANTISED, BATCH)
"""In the order of the table."""


@dataclass(frozen=True)
class Plan:
    """The memory that a stage needs, in bytes.

    Parameters:
        resident: component -> bytes that stay in memory.
        phases: phase -> component -> bytes that it adds.
        parameters: role -> number of its own weights.
        notes: assumptions and omissions of the plan.
        vllm_share: the share of the card that vLLM takes beside PPO.
    """

    stage: str
    resident: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]
    parameters: Mapping[str, int]
    notes: tuple[str, ...] = ()
    vllm_share: float = 0.0

    @property
    def worst(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def allocated(self) -> float:
        """Bytes of all tensors at the peak, as in `torch.cuda.max_memory_allocated`."""
        return sum(self.resident.values()) + sum(self.phases[self.worst].values())

    def at_peak(self) -> dict[str, float]:
        """Return component -> bytes at the peak."""
        phase = self.phases[self.worst]
        return {name: self.resident.get(name, 0) + phase.get(name, 0) for name in COMPONENTS}

    @property
    def usable_share(self) -> float:
        """The share of a card that the stage may use."""
        return max(0.0, 1 - SPARE - self.vllm_share)

    def fits(self, card: float) -> bool:
        """Return whether the plan fits a card of this many GiB."""
        return self.allocated + OVERHEAD <= card * GIB * self.usable_share

    @property
    def smallest_card(self) -> float | None:
        """GiB of the smallest card that fits; None if vLLM leaves nothing of any card."""
        return (self.allocated + OVERHEAD) / self.usable_share / GIB if self.usable_share else None

    @property
    def smallest_common_card(self) -> int | None:
        """GiB of the first of `CARDS` that it fits, or None."""
        return next((card for card in CARDS if self.fits(card)), None)


def format_plans(plans: Sequence[Plan]) -> Iterator[str]:
    """Yield the lines of the report on some stages."""
    stages = [plan.stage for plan in plans]
    roles = {role: [plan.parameters.get(role) for plan in plans] for plan in plans for role in plan.parameters}
    weights = {
        role: ["" if number is None else f"{number / 1e6:,.1f}" for number in numbers]
        for role, numbers in roles.items()
        if any(numbers)
    }
    yield from _table("Weights by role, millions", weights, stages)
    yield ""
    yield from _table("GiB at the peak", _component_rows(plans), stages)
    yield ""
    for plan in plans:
        phases = "; ".join(f"{name} {_gib(sum(parts.values()))}" for name, parts in plan.phases.items())
        yield f"{plan.stage}: {_gib(sum(plan.resident.values()))} throughout. Phases add: {phases}"
        yield from (f"{plan.stage}: {note}" for note in plan.notes)
    yield ""
    yield (
        f"These are the tensors on one GPU. `fits` adds {_gib(OVERHEAD)} GiB for CUDA and its libraries, and leaves "
        f"{SPARE:.0%} of the card free for fragmentation."
    )


def _component_rows(plans: Sequence[Plan]) -> dict[str, list[str]]:
    peaks = [plan.at_peak() for plan in plans]
    rows = {name: [_gib(peak[name]) for peak in peaks] for name in COMPONENTS if any(peak[name] for peak in peaks)}
    rows["peak"] = [_gib(plan.allocated) for plan in plans]
    rows["in phase"] = [plan.worst for plan in plans]
    cards = [plan.smallest_common_card for plan in plans]
    rows["fits, GB"] = [f"none up to {CARDS[-1]}" if card is None else f"{card} or more" for card in cards]
    return rows


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _table(title: str, rows: dict[str, list[str]], columns: Sequence[str]) -> Iterator[str]:
    names, cells = [title, *rows], [list(columns), *rows.values()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, row in zip(names, cells, strict=True):
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield f"{name.ljust(max(map(len, names)))}  {numbers}".rstrip()
