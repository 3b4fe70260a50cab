"""The evaluations of several seeds in one table."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from rlhf_recipes.core.files import write_json, write_text
from rlhf_recipes.evaluation.report import plots
from rlhf_recipes.evaluation.report.columns import Column, form_columns, kind_label, score_columns, truthfulness_columns
from rlhf_recipes.evaluation.types import EvaluationResults
from rlhf_recipes.rewards.matching import KINDS

FORM = ("entropy", "length", "perplexity")  # labels of `form_columns` in the table; the other columns are all in it


def write_summary(results: Sequence[EvaluationResults], stem: Path) -> str:
    """Write `stem.json`, `.md` and `.svg` of each seed's results; return tables."""
    first = results[0]
    form = {column.label: column for column in form_columns(first)}
    parts = {
        "scores": _read(results, [*score_columns(first), *(form[label] for label in FORM if label in form)]),
        "truthfulness": _read(results, truthfulness_columns(first)),
    }
    text = "\n\n".join(_table(values) for values in parts.values() if any(values.values()))
    write_json(stem.with_suffix(".json"), {"seeds": [one.seed for one in results], **parts})
    write_text(stem.with_suffix(".md"), text + "\n")
    if groups := first.groups:
        shares = {
            group: {
                name: {kind: values[kind_label(group, kind)] for kind in KINDS}
                for name, values in parts["truthfulness"].items()
            }
            for group in groups
        }
        write_text(stem.with_suffix(".svg"), plots.shares_of_kinds(shares))
    return text


def _read(results: Sequence[EvaluationResults], columns: Sequence[Column]) -> dict[str, dict[str, list[float]]]:
    """Return policy -> label of a column -> its number under each seed that has one."""
    policies: dict[str, dict[str, list[float]]] = {}
    for one in results:
        for name, policy in one.policies.items():
            values = policies.setdefault(name, {column.label: [] for column in columns})
            for column in columns:
                if estimate := column.read(policy):
                    values[column.label].append(estimate.mean)
    return policies


def _table(values: dict[str, dict[str, list[float]]]) -> str:
    """Return a Markdown table of means over seeds, with the range in brackets."""
    columns = [name for name in next(iter(values.values())) if any(policy[name] for policy in values.values())]
    lines = [f"| policy | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(_cell(policy[column]) for column in columns)} |" for name, policy in values.items()]
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean, low, high = (f"{value + 0.0:.2f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"
