"""The columns of the report's tables. Add a column here, and the page shows it.

`seeds.py` picks from these columns for the table over seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rlhf_recipes.evaluation.types import UNSET, Estimate, EvaluationResults, PolicyResult, Unset
from rlhf_recipes.rewards.matching import KINDS


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with two decimals, "-" for None."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.00"


def percent(value: float | None) -> str:
    """Return a share in percent, "-" for None."""
    return "-" if value is None else f"{value:.0%}"


@dataclass(frozen=True)
class Column:
    """A number of every policy."""

    label: str  # unique, in the table over seeds
    header: str  # over the column in the page; may have several lines
    read: Callable[[PolicyResult], Estimate | None]  # None: a dash; by its `difference` the number is marked or greyed
    format: Callable[[float], str] = number  # of the number and the ends of its interval
    note: Callable[[PolicyResult], str] = lambda policy: ""  # follows the number


def score_columns(results: EvaluationResults) -> list[Column]:
    """Return rewards, wins and KL."""
    columns = []
    for name, reward in results.rewards.items():
        header = f"{name}\n{'trained against' if reward.trained else 'held out'}"
        if isinstance(reward.trained, list) and reward.trained:
            header += f"\nby {', '.join(reward.trained)}"
        columns.append(Column(name, header, lambda policy, name=name: policy.rewards.get(name)))
    wins, kl = f"wins against {results.compare_with}", f"KL from {results.kl_reference}"

    def win_rate(policy: PolicyResult) -> Estimate | None:
        rate = policy.win_rate
        return Estimate(mean=rate.win_rate, interval=rate.interval, difference=rate.difference) if rate else None

    columns.append(Column(wins, f"wins against\n{results.compare_with}", win_rate, percent))
    if any(policy.win_rate and policy.win_rate.equal_length for policy in results.others.values()):
        columns.append(Column(f"{wins} at equal length", "wins at\nequal length", _equal_length, percent))
    return [
        *columns,
        Column(kl, f"{kl}\nnats an answer", lambda policy: policy.kl),
    ]


def truthfulness_columns(results: EvaluationResults) -> list[Column]:
    """Return columns of kinds of answers by group, and of calibration."""
    columns = []
    for group in results.groups:
        for kind in KINDS:
            name = kind.replace("_", " ")
            header = name if group == "all" else f"{group}\n{name}"
            columns.append(Column(kind_label(group, kind), header, _share(group, kind), percent))
    if not columns:
        return []

    def chance(policy: PolicyResult) -> str:
        result = policy.calibration_of_all
        return f" ({number(result.ece_if_calibrated)})" if result else ""

    return [
        *columns,
        Column("calibration error", "calibration\nerror (chance)", _calibration("ece"), note=chance),
        Column("Brier score", "Brier\nscore", _calibration("brier")),
    ]


def form_columns(results: EvaluationResults) -> list[Column]:
    """Return length, diversity, entropy and perplexity."""

    def diversity(name: str) -> Callable[[PolicyResult], Estimate | None]:
        return lambda policy: _plain(policy.diversity[name])

    def three_digits(value: float) -> str:
        return number(value, 3)

    columns = [
        Column("length", "length\ntokens", lambda policy: policy.length),
        Column("ended", "ended\nby EOS", lambda policy: policy.ended, percent),
        Column("distinct 1-grams", "distinct\n1-grams", diversity("distinct_1"), three_digits),
        Column("distinct 2-grams", "distinct\n2-grams", diversity("distinct_2"), three_digits),
        Column("self-BLEU", "self-BLEU", diversity("self_bleu")),
        Column("self-BLEU within", "self-BLEU\nof one prompt", diversity("self_bleu_within")),
        Column("repetition", "repetition", diversity("repetition")),
        Column("entropy", "entropy\nnats an answer", lambda policy: policy.entropy),
    ]
    if results.has_perplexity:
        columns.append(Column("perplexity", "perplexity on\npretraining text", lambda policy: _plain(policy.perplexity)))
    return columns


def kind_label(group: str, kind: str) -> str:
    """Return the label of a share of a kind of answers."""
    return f"{group}: {kind.replace('_', ' ')}"


def _plain(value: float | Unset | None, difference: Estimate | Unset | None = UNSET) -> Estimate | None:
    """Return a number without an interval."""
    return None if value is None or value is UNSET else Estimate(mean=value, interval=None, difference=difference)


def _equal_length(policy: PolicyResult) -> Estimate | None:
    return (policy.win_rate and policy.win_rate.equal_length) or None


def _share(group: str, kind: str) -> Callable[[PolicyResult], Estimate | None]:
    return lambda policy: (policy.truthfulness or {}).get(group, {}).get(kind)


def _calibration(name: str) -> Callable[[PolicyResult], Estimate | None]:
    def read(policy: PolicyResult) -> Estimate | None:
        result = policy.calibration_of_all
        return result and _plain(getattr(result, name), (result.difference or {}).get(name, UNSET))

    return read
