"""Pictures for the report, as standalone and reproducible SVG.

The background is transparent and the colours are of middle lightness, so a picture is legible on light and dark pages, also
as an `<img>`, which cannot see the colours of its page.
"""

import io
import textwrap
from collections.abc import Sequence
from itertools import cycle, pairwise
from typing import Any

from rlhf_recipes.evaluation.types import CalibrationBin

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY, BLUE, ORANGE, GREEN, RED = "#7d7d7d", "#3b82f6", "#d97706", "#16a34a", "#dc2626"
_COLOURS = (BLUE, GREEN, "#a855f7", RED)
_STYLE = {
    "svg.hashsalt": "rlhf-recipes",  # makes the names inside the same in every run
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may hold a dollar
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def reliability_diagram(bins: Sequence[CalibrationBin], title: str) -> str:
    """Draw accuracy against confidence with 95% intervals; the diagonal is perfect.

    Bars at the bottom show how many predictions each bin has. There must be a bin.
    """
    low, most = 0.5 if bins[0].low >= 0.5 else 0.0, max(entry.n for entry in bins)
    with mpl.rc_context(_STYLE):
        axes = _axes(title, f"confidence (bars: up to {most} predictions)", "share that is right")
        floor = min(low, *(entry.accuracy for entry in bins)) - 0.02
        axes.plot([low, 1], [low, 1], "--", color=GREY)
        for entry in bins:
            height = 0.15 * (1 - low) * entry.n / most
            axes.bar(entry.low, height, entry.high - entry.low, floor, align="edge", color=ORANGE, alpha=0.7)
        confidence, accuracy = [entry.confidence for entry in bins], [entry.accuracy for entry in bins]
        axes.vlines(confidence, *zip(*(entry.interval for entry in bins), strict=True), color=BLUE)
        axes.plot(confidence, accuracy, "o", color=BLUE, gid="bins")
        axes.set(xlim=(low, 1), ylim=(floor, 1.02))
        return _svg(axes.figure)


def score_histogram(distribution: dict[str, Any], title: str) -> str:
    """Draw a histogram of scores from `score_distribution`, with a line at the mean."""
    edges, counts = distribution["histogram"]["edges"], distribution["histogram"]["counts"]
    with mpl.rc_context(_STYLE):
        axes = _axes(title, f"score (mean {distribution['mean']:.3g}, dashed)", "answers")
        axes.bar(edges[:-1], counts, [right - left for left, right in pairwise(edges)], align="edge", color=BLUE, alpha=0.7)
        axes.axvline(distribution["mean"], linestyle="--", color=ORANGE)
        return _svg(axes.figure)


def learning_curves(log: Sequence[dict[str, Any]], metrics: Sequence[str], columns: int = 3) -> str:
    """Draw metrics of a trainer's `log_history` over steps, one panel each.

    Metrics that were never logged are left out.

    Raises:
        ValueError: None of them was logged.
    """
    curves = {name: [(entry["step"], entry[name]) for entry in log if entry.get(name) is not None] for name in metrics}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        raise ValueError(f"None of {', '.join(metrics)} is in the log.")
    columns = min(columns, len(curves))
    rows = -(-len(curves) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.0 * columns, 2.2 * rows), layout="constrained")
        for place, (name, points) in enumerate(curves.items(), start=1):
            axes = figure.add_subplot(rows, columns, place)
            axes.plot(*zip(*points, strict=True), color=BLUE, gid=name, marker="o" if len(points) < 4 else None)
            axes.set_title(name, fontsize=10)
        return _svg(figure)


def frontier(
    runs: dict[str, Sequence[tuple[float, float, str]]],
    best_of: Sequence[tuple[float, float, str]],
    policies: Sequence[tuple[float, float, str]],
    title: str,
) -> str:
    """Draw reward against KL: paths of runs, best-of-n (dashed), policies by name.

    Every point is (KL in nats per answer, mean reward, label).
    """
    with mpl.rc_context(_STYLE):
        axes = _axes(title, "KL from the reference, nats an answer", "mean reward")
        for (name, points), colour in zip(runs.items(), cycle(_COLOURS), strict=False):
            _path(axes, points, colour, name, "-o")
        if best_of:
            _path(axes, best_of, ORANGE, "best of n (KL: a bound)", "--s")
        for kl, reward, label in policies:
            axes.plot(kl, reward, "D", color=GREY)
            axes.annotate(label, (kl, reward), xytext=(5, -11), textcoords="offset points", fontsize=8)
        if best_of or any(runs.values()):
            axes.legend(frameon=False, fontsize=8, loc="best")
        axes.margins(0.12)
        return _svg(axes.figure)


def shares_of_kinds(groups: dict[str, dict[str, dict[str, Sequence[float]]]]) -> str:
    """Draw bars of the kinds of each policy's answers, one panel per group.

    `groups` is group -> policy -> kind -> share of answers under each seed. Bars are means over seeds. A dot marks each seed's
    made-up share.
    """
    policies = list(next(iter(groups.values())))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.6 * len(groups), 0.9 + 0.42 * len(policies)), layout="constrained")
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axes, (group, shares) in zip(panels, groups.items(), strict=True):
            _bars(axes, shares)
            axes.set(title=group, xlabel="share of answers", xlim=(0, 1))
        panels[0].set_yticks(range(len(policies)), policies)
        panels[0].invert_yaxis()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        return _svg(figure)


def _bars(axes: Axes, policies: dict[str, dict[str, Sequence[float]]]) -> None:
    """Draw made-up shares first, where their lengths can be compared."""
    left = np.zeros(len(policies))
    for kind, colour in (("made_up", ORANGE), ("abstained", GREY), ("right", BLUE)):
        values = [shares[kind] for shares in policies.values()]
        means = np.array([np.mean(seeds) if len(seeds) else 0.0 for seeds in values])
        axes.barh(range(len(values)), means, left=left, color=colour, alpha=0.75, label=kind.replace("_", " "))
        if kind == "made_up":
            for place, seeds in enumerate(values):
                axes.plot(seeds, [place] * len(seeds), "o", color=ORANGE, markersize=4, gid="seeds")
        left += means


def _path(axes: Axes, points: Sequence[tuple[float, float, str]], colour: str, name: str, style: str) -> None:
    """Draw a line through points, without labels that would overlap later ones."""
    if not points:
        return
    kl, reward, labels = zip(*points, strict=True)
    axes.plot(kl, reward, style, color=colour, label=name, markersize=4)
    wide, high = (max(values) - min(values) or 1 for values in (kl, reward))
    labelled: list[tuple[float, float]] = []
    for x, y, label in reversed(list(zip(kl, reward, labels, strict=True))):
        if all(abs(x - a) / wide + abs(y - b) / high > 0.2 for a, b in labelled):
            axes.annotate(label, (x, y), xytext=(3, 4), textcoords="offset points", fontsize=7, color=colour)
            labelled.append((x, y))


def _axes(title: str, x: str, y: str) -> Axes:
    axes = Figure(figsize=(4.4, 3.6), layout="constrained").subplots()
    axes.set(title=textwrap.fill(title, 42), xlabel=x, ylabel=y)
    return axes


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()
