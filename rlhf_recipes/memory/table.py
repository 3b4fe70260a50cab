"""Plans as text: what is in memory by component and stage, where the peak is, and which cards it fits."""

from collections.abc import Iterator, Sequence

from rlhf_recipes.memory.stages import CARDS, COMPONENTS, GIB, OVERHEAD, SPARE, Plan


def report(plans: Sequence[Plan]) -> Iterator[str]:
    """The lines of the report."""
    yield from _table("Weights of their own, millions", _parameters(plans), [plan.stage for plan in plans])
    yield ""
    yield from _table("GiB at the peak", _components(plans), [plan.stage for plan in plans])
    yield ""
    for plan in plans:
        phases = ", ".join(f"{name} {_gib(sum(parts.values()))}" for name, parts in plan.phases.items())
        yield f"{plan.stage}: {_gib(sum(plan.resident.values()))} all the time, and on top: {phases}"
        yield from (f"{plan.stage}: {note}" for note in plan.notes)
    yield ""
    yield (
        f"All of these are tensors on one GPU. In `fits`, {_gib(OVERHEAD)} GiB for CUDA and its libraries come on top, and "
        f"{SPARE:.0%} of the card for what the allocator cannot use."
    )


def _parameters(plans: Sequence[Plan]) -> dict[str, list[str]]:
    roles = dict.fromkeys(role for plan in plans for role in plan.parameters)
    rows = {}
    for role in roles:
        numbers = [plan.parameters.get(role) for plan in plans]
        if any(numbers):
            rows[role] = ["" if number is None else f"{number / 1e6:,.1f}" for number in numbers]
    return rows


def _components(plans: Sequence[Plan]) -> dict[str, list[str]]:
    peaks = [plan.at_peak() for plan in plans]
    rows = {name: [_gib(peak[name]) for peak in peaks] for name in COMPONENTS if any(peak[name] for peak in peaks)}
    rows["peak"] = [_gib(plan.allocated) for plan in plans]
    rows["in phase"] = [plan.worst for plan in plans]
    rows["fits, GB"] = [_cards(plan) for plan in plans]
    return rows


def _cards(plan: Plan) -> str:
    smallest = plan.smallest
    return f"none up to {CARDS[-1]}" if smallest is None else f"{smallest} or more"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _table(title: str, rows: dict[str, list[str]], columns: Sequence[str]) -> Iterator[str]:
    names = [title, *rows]
    cells = [list(columns), *rows.values()]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    for name, row in zip(names, cells, strict=True):
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield f"{name.ljust(max(map(len, names)))}  {numbers}".rstrip()
