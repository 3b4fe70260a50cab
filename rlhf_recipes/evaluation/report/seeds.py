"""The evaluations of several seeds in one table."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from rlhf_recipes.core.files import write_json, write_text
from rlhf_recipes.evaluation.report import plots
from rlhf_recipes.evaluation.report.columns import Column, form_columns, kind_label, score_columns, truthfulness_columns
from rlhf_recipes.evaluation.types import EvaluationResults
from rlhf_recipes.rewards.matching import KINDS

Values = dict[str, dict[str, list[float]]]
"""Policy -> label of a column -> its number under each seed that has one."""

FORM = ("entropy", "length", "perplexity")
"""Labels of `form_columns` in the table; those of the other columns are all in it."""


def write_summary(results: Sequence[EvaluationResults], stem: Path) -> str:
    """Write `stem.json`, `stem.md` and `stem.svg`; return the tables.

    Args:
        results: Of each seed.
        stem: Path without suffix.
    """
    first = results[0]
    form = {column.label: column for column in form_columns(first)}
    parts = {
        "scores": read_columns(results, [*score_columns(first), *(form[label] for label in FORM if label in form)]),
        "truthfulness": read_columns(results, truthfulness_columns(first)),
    }
    text = "\n\n".join(table(values) for values in parts.values() if any(values.values()))
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


def read_columns(results: Sequence[EvaluationResults], columns: Sequence[Column]) -> Values:
    """Return the numbers of the columns, of every policy under every seed."""
    names = dict.fromkeys(name for one in results for name in one.policies)
    policies = {name: [one.policies[name] for one in results if name in one.policies] for name in names}
    return {
        name: {
            column.label: [estimate.mean for policy in under_seeds if (estimate := column.read(policy))] for column in columns
        }
        for name, under_seeds in policies.items()
    }


def table(values: Values) -> str:
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
