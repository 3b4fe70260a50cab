"""The evaluations of several seeds in one table: chance of training shows between seeds, not within one."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.core.files import write_json, write_text
from rlhf_recipes.evaluation.report import plots
from rlhf_recipes.evaluation.report.html import groups_shown
from rlhf_recipes.rewards.matching import KINDS

# policy -> figure -> its value under each seed that has one
Values = dict[str, dict[str, list[float]]]


def scores(metrics: Sequence[dict[str, Any]]) -> Values:
    """Mean score under each reward, win rate, KL, entropy, length and perplexity of every policy.

    Args:
        metrics: what `metrics.json` holds, of each seed.
    """
    rival, reference = metrics[0]["compare_with"], metrics[0]["kl_reference"]
    readers: dict[str, Callable[[dict[str, Any]], float | None]] = {
        name: lambda policy, name=name: _mean(policy["rewards"].get(name)) for name in metrics[0]["rewards"]
    }
    readers |= {
        f"wins against {rival}": lambda policy: (policy.get("win_rate") or {}).get("win_rate"),
        f"KL from {reference}": lambda policy: _mean(policy["kl"]),
        "entropy": lambda policy: _mean(policy["entropy"]),
        "length": lambda policy: _mean(policy["length"]),
        "perplexity": lambda policy: policy.get("perplexity"),
    }
    return _read(metrics, readers)


def truthfulness(metrics: Sequence[dict[str, Any]]) -> Values:
    """Shares of right, abstaining and made-up answers by group, and calibration; empty where there were no references.

    Args:
        metrics: what `metrics.json` holds, of each seed.
    """
    readers: dict[str, Callable[[dict[str, Any]], float | None]] = {
        _label(group, kind): lambda policy, group=group, kind=kind: _mean(
            policy.get("truthfulness", {}).get(group, {}).get(kind)
        )
        for group in groups_shown(metrics[0])
        for kind in KINDS
    }
    if readers:
        readers["calibration error"] = lambda policy: _calibration(policy, "ece")
        readers["Brier score"] = lambda policy: _calibration(policy, "brier")
    return _read(metrics, readers)


def write_summary(metrics: Sequence[dict[str, Any]], stem: Path) -> str:
    """Writes `stem.json`, `stem.md` and, where there is truthfulness, `stem.svg`; returns the text of the tables.

    Args:
        metrics: what `metrics.json` holds, of each seed.
        stem: where, without ending.
    """
    parts = {"scores": scores(metrics), "truthfulness": truthfulness(metrics)}
    text = "\n\n".join(table(values) for values in parts.values() if any(values.values()))
    write_json(stem.with_suffix(".json"), {"seeds": [one["seed"] for one in metrics], **parts})
    write_text(stem.with_suffix(".md"), text + "\n")
    if groups := groups_shown(metrics[0]):
        pictured = {
            group: {name: {kind: found[_label(group, kind)] for kind in KINDS} for name, found in parts["truthfulness"].items()}
            for group in groups
        }
        write_text(stem.with_suffix(".svg"), plots.shares_of_kinds(pictured))
    return text


def table(values: Values) -> str:
    """Markdown: the mean over seeds, and the least and the greatest in brackets.

    Args:
        values: from `scores` or `truthfulness`.
    """
    columns = [name for name in next(iter(values.values())) if any(policy[name] for policy in values.values())]
    lines = [f"| policy | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(_cell(policy[column]) for column in columns)} |" for name, policy in values.items()]
    return "\n".join(lines)


def _read(metrics: Sequence[dict[str, Any]], readers: dict[str, Callable[[dict[str, Any]], float | None]]) -> Values:
    names = dict.fromkeys(name for one in metrics for name in one["policies"])
    found = {name: [one["policies"][name] for one in metrics if name in one["policies"]] for name in names}
    return {
        name: {label: [value for policy in policies if (value := read(policy)) is not None] for label, read in readers.items()}
        for name, policies in found.items()
    }


def _label(group: str, kind: str) -> str:
    return f"{group}: {kind.replace('_', ' ')}"


def _mean(figure: dict[str, Any] | None) -> float | None:
    return figure["mean"] if figure else None


def _calibration(policy: dict[str, Any], key: str) -> float | None:
    found = (policy.get("calibration") or {}).get("all")
    return found[key] if found else None


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean, low, high = (f"{value + 0.0:.2f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"
