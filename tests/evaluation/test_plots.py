"""Pictures of the report."""

import re
from xml.etree import ElementTree

from rlhf_recipes.evaluation.metrics.calibration import calibration
from rlhf_recipes.evaluation.metrics.scores import score_distribution
from rlhf_recipes.evaluation.report import plots
from rlhf_recipes.evaluation.reward_evaluation import evaluate_reward
from rlhf_recipes.evaluation.types import CalibrationBin
from rlhf_recipes.rewards.matching import KINDS
from support.evaluations import noisy_rankings

import numpy as np
import pytest

SVG = "{http://www.w3.org/2000/svg}"


def as_bins(calibration):
    return [CalibrationBin(**entry) for entry in calibration["bins"]]


def pictures():
    result = evaluate_reward(*noisy_rankings([4] * 30))
    bins = as_bins(result["calibration"])
    return (
        bins,
        plots.reliability_diagram(bins, "a < b & c"),
        result["scores"],
        plots.score_histogram(result["scores"], "a < b & c"),
    )


def test_pictures_are_standalone_svg():
    assert pictures() == pictures()
    for picture in pictures()[1::2]:
        root = ElementTree.fromstring(picture)
        assert "a < b & c" in [text.text for text in root.iter(f"{SVG}text")]
        links = re.findall(r'(?:href="|url\()([^")]*)', picture)
        assert all(link.startswith("#") for link in links)
        assert not re.search(r"<script|<image|\bnan\b|\binf\b", picture)
        coloured = set(re.findall(r"(?:stroke|fill): (#[0-9a-f]{6})", picture)) - {"#ffffff"}
        assert coloured <= {plots.GREY, plots.BLUE, plots.ORANGE}


def test_colours_contrast_with_white_and_black():
    """By WCAG's contrast of at least 3, that of graphics and large print."""
    for colour in (plots.GREY, plots.BLUE, plots.ORANGE, plots.GREEN, plots.RED):
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert min(1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05) >= 3


def test_reliability_diagram_places_every_bin():
    bins, picture, *_ = pictures()
    root = ElementTree.fromstring(picture)
    marks = [use for group in root.iter(f"{SVG}g") if group.get("id") == "bins" for use in group.iter(f"{SVG}use")]
    places = [(float(mark.get("x")), float(mark.get("y"))) for mark in marks]
    assert len(places) == len(bins)
    # positions are linear in the numbers, and better is up
    for numbers, sign, of in ((0, 1, "confidence"), (1, -1, "accuracy")):
        values, drawn = [getattr(entry, of) for entry in bins], [place[numbers] for place in places]
        slope = np.polyfit(values, drawn, 1)
        assert slope[0] * sign > 0
        assert drawn == pytest.approx(np.polyval(slope, values), abs=0.01)


def test_bars_of_kinds_show_means_and_a_dot_per_seed():
    shares = {"a": {"made_up": [0.2, 0.4], "abstained": [0.1, 0.3], "right": [0.7, 0.3]}}
    shares["b"] = {kind: [0.5, 0.5] for kind in KINDS}
    root = ElementTree.fromstring(plots.shares_of_kinds({"known": shares, "not known": shares}))
    assert {"known", "not known", "a", "b"} <= {text.text for text in root.iter(f"{SVG}text")}
    dots = [group for group in root.iter(f"{SVG}g") if (group.get("id") or "").startswith("seeds")]
    assert [len(list(group.iter(f"{SVG}use"))) for group in dots] == [2] * 4
    first, second = (float(use.get("x")) for use in dots[0].iter(f"{SVG}use"))
    widths = {}
    for path in root.iter(f"{SVG}path"):
        if colour := re.search(r"fill: (#[0-9a-f]{6}); opacity", path.get("style") or ""):
            across = [float(x) for x in re.findall(r"[ML] ([\d.]+)", path.get("d"))]
            widths.setdefault(colour[1], []).append(max(across) - min(across))
    # 0.2 of the axis lie between the two dots
    unit = (second - first) / 0.2
    for colour, share in ((plots.RED, 0.3), (plots.GREY, 0.2), (plots.GREEN, 0.5)):
        assert widths[colour][0] / unit == pytest.approx(share, abs=0.01)


def test_pictures_of_edge_cases_are_drawn():
    for result in (calibration([0.25], [1]), calibration([1.0, 1.0], [1, 1], low=0.5)):
        ElementTree.fromstring(plots.reliability_diagram(as_bins(result), "one bin"))
    ElementTree.fromstring(plots.score_histogram(score_distribution([0.1] * 3), "constant"))
