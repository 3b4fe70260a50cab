"""Plans as text: components by stage, the phase of each peak, the cards that fit."""

from collections.abc import Iterator, Sequence

from rlhf_recipes.memory.plan import CARDS, COMPONENTS, GIB, OVERHEAD, SPARE, Plan


def format_plans(plans: Sequence[Plan]) -> Iterator[str]:
    """Yield the lines of the report on some stages."""
    stages = [plan.stage for plan in plans]
    yield from _table("Weights by role, millions", _role_rows(plans), stages)
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


def _role_rows(plans: Sequence[Plan]) -> dict[str, list[str]]:
    rows = {}
    for role in dict.fromkeys(role for plan in plans for role in plan.parameters):
        numbers = [plan.parameters.get(role) for plan in plans]
        if any(numbers):
            rows[role] = ["" if number is None else f"{number / 1e6:,.1f}" for number in numbers]
    return rows


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
