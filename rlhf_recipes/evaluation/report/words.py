"""Numbers and names as words."""

from rlhf_recipes.evaluation.types import Estimate

_FEW = 100  # answers that are counted one by one


def of_answers(share: Estimate, num_answers: int) -> str:
    """Return a share of answers as "5 of 100", or as "1 of 3" where they are few."""
    return f"{alone(share, num_answers)} of {out_of(share, num_answers)}"


def alone(share: Estimate, num_answers: int) -> str:
    """Return the number of such answers among `out_of`."""
    total = out_of(share, num_answers)
    return hundredths(share.mean) if total == _FEW else f"{share.mean * total:.0f}"


def out_of(share: Estimate, num_answers: int) -> int:
    """Return 100, or the number of all answers where they are fewer."""
    return min(_FEW, (share.n or _FEW) * num_answers)


def hundredths(share: float) -> str:
    """Return a share as a number of 100."""
    if 0 < share < 0.005:
        return "fewer than 1"
    return "more than 99" if 0.995 <= share < 1 else f"{100 * share:.0f}"


def duration(seconds: float) -> str:
    """Return seconds as "45 s", "3 min" or "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def listed(parts: list[str]) -> str:
    """Return "a", "a and b", or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def one_decimal(value: float) -> str:
    """Return a number with one decimal, none from 100 on."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
