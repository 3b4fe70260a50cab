"""Pictures and verdict of the report."""

import re
from xml.etree import ElementTree

from rlhf_recipes.evaluation.metrics.calibration import calibration
from rlhf_recipes.evaluation.metrics.scores import score_distribution
from rlhf_recipes.evaluation.report import plots
from rlhf_recipes.evaluation.report.html import render
from rlhf_recipes.evaluation.report.verdict import verdict
from rlhf_recipes.evaluation.reward_evaluation import evaluate_reward
from rlhf_recipes.evaluation.types import BestOf, CalibrationBin, Estimate, WinRate
from rlhf_recipes.rewards.matching import KINDS
from support.evaluations import evaluation_results, exactly, noisy_rankings, policy_result

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


# --- The verdict in words --------------------------------------------------------------------------------


def changed(mean, low, high):
    """Return an estimate with this difference from the baseline."""
    return exactly(0.0, Estimate(mean=mean, interval=[low, high], n=20))


def rate(judge, share, low, high):
    return WinRate(judge=judge, win_rate=share, interval=[low, high], n=20, prompts=20, ties=0)


def sentences(trained=("ppo",), **differences):
    """Return the verdict on `ppo` against `sft`, by differences in rewards."""
    rewards = {name: changed(*values) for name, values in differences.items()}
    ppo = policy_result(rewards=rewards, win_rate=rate("gold", 0.4, 0.3, 0.55), length=changed(2, -1, 5))
    return verdict(evaluation_results({"sft": policy_result(), "ppo": ppo}, {"proxy": list(trained), "gold": False}))


def test_the_verdict_lists_differences_that_may_be_chance():
    first, second, *_, last = sentences(proxy=(1.0, 0.5, 1.5), gold=(0.1, -0.1, 0.3))
    assert first == "Judged by gold, not told apart from sft: ppo (40% [30%, 55%])."
    assert "proxy +1.00 [+0.50, +1.50]; gold (not trained against) +0.10 [-0.10, +0.30] (inside the noise)" in second
    assert last.startswith("Inside the noise, as differences from sft: ppo: score by gold, length. Looked at: scores,")


def test_the_verdict_warns_of_answers_that_are_cut_off_or_say_more_than_the_reference():
    often, rarely = ({"ended": exactly(1 - share), "reworded": exactly(share)} for share in (0.3, 0.04))
    lines = verdict(evaluation_results({"sft": policy_result(**rarely), "ppo": policy_result(**often)}, {}))
    assert "Answers cut off at max_completion_length: ppo 30%. Raise it to judge them whole." in lines
    assert any(line.startswith("Answers that count as made up though they contain the reference: ppo 30%.") for line in lines)
    lines = verdict(evaluation_results({"sft": policy_result(**rarely), "ppo": policy_result(**rarely)}, {}))
    assert not [line for line in lines if line.startswith("Answers")]


def test_a_judge_that_prefers_nothing_says_so():
    ties = WinRate(judge="gold", win_rate=0.5, interval=[0.4, 0.6], n=9, prompts=9, ties=9)
    results = evaluation_results({"sft": policy_result(), "ppo": policy_result(win_rate=ties)}, {"gold": False})
    assert verdict(results)[0] == "Judged by gold, not told apart from sft: ppo (all tie)."


@pytest.mark.parametrize(("share", "prompts", "words"), [(0.9, 20, "better"), (0.9, 5, "not told apart"), (0.1, 20, "worse")])
def test_wins_count_as_other_differences_do(share, prompts, words):
    wins = WinRate(judge="gold", win_rate=share, interval=[share - 0.05, share + 0.05], n=9, prompts=prompts, ties=0)
    results = evaluation_results({"sft": policy_result(), "ppo": policy_result(win_rate=wins)}, {"gold": False})
    assert f"Judged by gold, {words}" in verdict(results)[0]
    row = re.search(r"<th>ppo</th>(.*?)</tr>", render(results), re.DOTALL)[1]
    assert row.count('class="noise"') == (words == "not told apart")
    assert ("▲" in row, "▼" in row) == (words == "better", words == "worse")


@pytest.mark.parametrize(
    ("gold", "trained", "warns"),
    [((0.1, -0.1, 0.3), ("ppo",), False), ((-0.2, -0.3, -0.1), ("ppo",), True), ((-0.2, -0.3, -0.1), ("another",), False)],
)
def test_the_verdict_warns_of_over_optimisation(gold, trained, warns):
    warning = "ppo may be over-optimised: it gains by proxy"
    lines = sentences(trained, proxy=(1.0, 0.5, 1.5), gold=gold)
    assert any(line.startswith(warning) for line in lines) == warns


CHOSEN = {"best_of": BestOf(policy="sft", n=4, reward="proxy")}


def winners(judge, **policies):
    """Return the verdict on policies that all win, of which `ppo` was trained against `proxy`."""
    fields = {"rewards": {"proxy": changed(1.0, 0.5, 1.5)}, "win_rate": rate(judge, 0.7, 0.6, 0.8)}
    results = {name: policy_result(**fields | more) for name, more in policies.items()}
    return verdict(evaluation_results({"sft": policy_result()} | results, {"proxy": ["ppo"], "gold": False}))


def test_wins_by_the_judge_that_a_policy_was_made_for_are_marked():
    trained = {"best_of": BestOf(policy="ppo", n=4, reward="gold")}
    assert winners("proxy", dpo={}, ppo={}, best=CHOSEN, both=trained)[0] == (
        "Judged by proxy, better than sft: dpo (wins 70% [60%, 80%]), ppo (wins 70% [60%, 80%]; trained against this judge), "
        "best (wins 70% [60%, 80%]; chosen by this judge), both (wins 70% [60%, 80%]; trained against this judge)."
    )
    assert "this judge" not in winners("gold", ppo={}, best=CHOSEN)[0]
    assert "this judge" not in winners("a chat model", ppo={}, best=CHOSEN)[0]


def test_rewards_that_a_policy_was_not_trained_against_are_marked():
    _, dpo, ppo, best, *_ = winners("proxy", dpo={}, ppo={}, best=CHOSEN)
    assert dpo.startswith("dpo against sft: proxy (not trained against) +1.00")
    assert ppo.startswith("ppo against sft: proxy +1.00")
    assert best.startswith("best against sft: proxy +1.00")
