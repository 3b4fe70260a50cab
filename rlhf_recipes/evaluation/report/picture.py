"""What the report's first picture shows: kinds of answers, or wins."""

from dataclasses import dataclass

from rlhf_recipes.evaluation.report.standing import judge_of, made_for, ranked
from rlhf_recipes.evaluation.types import EvaluationResults, WinRate
from rlhf_recipes.rewards.matching import KINDS


@dataclass(frozen=True)
class Bar:
    """A policy with shares of its answers, or wins against the baseline."""

    name: str
    note: str  # under the name
    shares: dict[str, float] | None = None  # kind of answer -> share
    rate: WinRate | None = None


@dataclass(frozen=True)
class Panel:
    """Bars of all policies, the best first, on one group of prompts."""

    heading: str
    bars: list[Bar]


def panels(results: EvaluationResults) -> list[Panel]:
    """Return a panel for each group where there is truth, else one of wins, if any."""
    order, judge = ranked(results), judge_of(results)
    notes = dict.fromkeys(order, "") | {results.compare_with: "baseline"}
    if results.groups:
        shown = {name: results.policies[name].truthfulness for name in order if results.policies[name].truthfulness}
        baseline = results.policies[results.compare_with].truthfulness
        return [
            Panel(
                f"Answers {results.words_for(group)}".strip() + f" ({baseline[group]['right'].n} prompts)",
                [
                    Bar(name, notes[name], shares={kind: groups[group][kind].mean for kind in KINDS})
                    for name, groups in shown.items()
                ],
            )
            for group in results.groups
        ]
    if judge is None:
        return []
    rated = [name for name in order if name != results.compare_with and results.policies[name].win_rate]
    bars = []
    for name in rated:
        rate, made = results.policies[name].win_rate, made_for(name, judge, results)
        bars.append(Bar(name, f"{rate.win_rate:.0%}{f', {made} this judge' if made else ''}", rate=rate))
    return [Panel(f"How often each answer is preferred to that of {results.compare_with}, judged by {judge}", bars)]
