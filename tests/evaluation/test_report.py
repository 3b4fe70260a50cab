"""Pictures and verdict of the report."""

import re
from dataclasses import replace
from xml.etree import ElementTree

from rlhf_recipes.core.files import write_json
from rlhf_recipes.evaluation.metrics.calibration import calibration
from rlhf_recipes.evaluation.metrics.scores import score_distribution
from rlhf_recipes.evaluation.named_rewards import NamedReward
from rlhf_recipes.evaluation.policy_checks import add_recorded_training, read_training
from rlhf_recipes.evaluation.report import plots
from rlhf_recipes.evaluation.report.details import details
from rlhf_recipes.evaluation.report.html import render
from rlhf_recipes.evaluation.report.verdict import heading, verdict
from rlhf_recipes.evaluation.reward_evaluation import evaluate_reward
from rlhf_recipes.evaluation.types import UNSET, BestOf, CalibrationBin, Estimate, WinRate
from rlhf_recipes.generation.policies import Policy
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
    for colour, share in ((plots.ORANGE, 0.3), (plots.GREY, 0.2), (plots.BLUE, 0.5)):
        assert widths[colour][0] / unit == pytest.approx(share, abs=0.01)


def test_pictures_of_edge_cases_are_drawn():
    for result in (calibration([0.25], [1]), calibration([1.0, 1.0], [1, 1], low=0.5)):
        ElementTree.fromstring(plots.reliability_diagram(as_bins(result), "one bin"))
    ElementTree.fromstring(plots.score_histogram(score_distribution([0.1] * 3), "constant"))


# --- All differences in words --------------------------------------------------------------------------------


def changed(mean, low, high):
    """Return an estimate with this difference from the baseline."""
    return exactly(0.0, Estimate(mean=mean, interval=[low, high], n=20))


def rate(judge, share, low, high):
    return WinRate(judge=judge, win_rate=share, interval=[low, high], n=20, prompts=20, ties=0)


def sentences(trained=("ppo",), **differences):
    """Return the details on `ppo` against `sft`, by differences in rewards."""
    rewards = {name: changed(*values) for name, values in differences.items()}
    ppo = policy_result(rewards=rewards, win_rate=rate("gold", 0.4, 0.3, 0.55), length=changed(2, -1, 5))
    return details(evaluation_results({"sft": policy_result(), "ppo": ppo}, {"proxy": list(trained), "gold": False}))


def test_the_details_lists_differences_that_may_be_chance():
    first, second, *_, last = sentences(proxy=(1.0, 0.5, 1.5), gold=(0.1, -0.1, 0.3))
    assert first == "Judged by gold, not told apart from sft: ppo (40% [30%, 55%])."
    assert "proxy +1.00 [+0.50, +1.50]; gold (not trained against) +0.10 [-0.10, +0.30] (inside the noise)" in second
    assert last.startswith("Inside the noise, as differences from sft: ppo: score by gold, length. Looked at: scores,")


def test_the_details_warns_of_answers_that_are_cut_off_or_say_more_than_the_reference():
    often, rarely = ({"ended": exactly(1 - share), "reworded": exactly(share)} for share in (0.3, 0.04))
    lines = details(evaluation_results({"sft": policy_result(**rarely), "ppo": policy_result(**often)}, {}))
    assert "Answers cut off at max_completion_length: ppo 30%. Raise it to judge them whole." in lines
    assert any(line.startswith("Answers that count as made up though they contain the reference: ppo 30%.") for line in lines)
    lines = details(evaluation_results({"sft": policy_result(**rarely), "ppo": policy_result(**rarely)}, {}))
    assert not [line for line in lines if line.startswith("Answers")]


def test_a_judge_that_prefers_nothing_says_so():
    ties = WinRate(judge="gold", win_rate=0.5, interval=[0.4, 0.6], n=9, prompts=9, ties=9)
    results = evaluation_results({"sft": policy_result(), "ppo": policy_result(win_rate=ties)}, {"gold": False})
    assert details(results)[0] == "Judged by gold, not told apart from sft: ppo (all tie)."


@pytest.mark.parametrize(("share", "prompts", "words"), [(0.9, 20, "better"), (0.9, 5, "not told apart"), (0.1, 20, "worse")])
def test_wins_count_as_other_differences_do(share, prompts, words):
    wins = WinRate(judge="gold", win_rate=share, interval=[share - 0.05, share + 0.05], n=9, prompts=prompts, ties=0)
    results = evaluation_results({"sft": policy_result(), "ppo": policy_result(win_rate=wins)}, {"gold": False})
    assert f"Judged by gold, {words}" in details(results)[0]
    row = re.search(r"<th>ppo</th>(.*?)</tr>", render(results), re.DOTALL)[1]
    assert row.count('class="noise"') == (words == "not told apart")
    assert ("▲" in row, "▼" in row) == (words == "better", words == "worse")


@pytest.mark.parametrize(
    ("gold", "trained", "warns"),
    [((0.1, -0.1, 0.3), ("ppo",), False), ((-0.2, -0.3, -0.1), ("ppo",), True), ((-0.2, -0.3, -0.1), ("another",), False)],
)
def test_the_details_warns_of_over_optimisation(gold, trained, warns):
    warning = "ppo may be over-optimised: it gains by proxy"
    lines = sentences(trained, proxy=(1.0, 0.5, 1.5), gold=gold)
    assert any(line.startswith(warning) for line in lines) == warns


CHOSEN = {"best_of": BestOf(policy="sft", n=4, reward="proxy")}


def winners(judge, **policies):
    """Return the details on policies that all win, of which `ppo` was trained against `proxy`."""
    fields = {"rewards": {"proxy": changed(1.0, 0.5, 1.5)}, "win_rate": rate(judge, 0.7, 0.6, 0.8)}
    results = {name: policy_result(**fields | more) for name, more in policies.items()}
    return details(evaluation_results({"sft": policy_result()} | results, {"proxy": ["ppo"], "gold": False}))


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


# --- The verdict in plain words ---------------------------------------------------------------------------


def share(mean, difference=None):
    """Return a share of the answers to 60 prompts."""
    changed = {} if difference is None else {"difference": Estimate(mean=difference[0], interval=list(difference[1:]), n=60)}
    return Estimate(mean=mean, interval=[mean, mean], n=60, **changed)


def truth(known, unknown, difference=None):
    """Return truthfulness of two groups, each by its shares right, abstained and made up."""
    groups = {"all": known, "known": known, "not known": unknown}
    kinds = {
        group: dict(zip(KINDS, (share(one, difference) for one in shares), strict=True)) for group, shares in groups.items()
    }
    return {"truthfulness": kinds, "over_abstained": kinds["known"]["abstained"]}


CLEAR, NOISE = (0.4, 0.3, 0.5), (0.01, -0.1, 0.1)


def results_of(prompts=60, group_names=None, warnings=(), rewards=None, **policies):
    """Return results of `sft` and other policies, with a judge that no policy was trained against unless `rewards` says so."""
    return evaluation_results(
        policies, rewards or {"gold": False}, prompts=prompts, group_names=group_names or {}, warnings=list(warnings)
    )


SFT = truth((0.75, 0.22, 0.03), (0.09, 0.27, 0.64))
PPO = truth((0.985, 0.01, 0.005), (0.02, 0.93, 0.05), CLEAR)


def test_the_first_screen_says_who_is_better_what_it_answers_and_what_it_costs():
    groups = {"known": "about people it has read about", "not known": "about strangers"}
    ppo = policy_result(win_rate=rate("gold", 0.7, 0.6, 0.8), perplexity=12.96, **PPO)
    results = replace(
        results_of(group_names=groups, sft=policy_result(perplexity=7.06, **SFT), ppo=ppo), num_answers=2, has_perplexity=True
    )
    first, answers, cost, trust = verdict(results)
    assert heading(results) == "ppo is better than sft"
    assert first.startswith("ppo is better than sft, judged by gold: its answer is the better one in 70 of 100 comparisons,")
    assert answers == (
        "ppo makes things up in 5 of 100 answers about strangers (sft: 64). Of 100 answers about people it has read about, "
        "98 are right (sft: 75) and 1 abstains (sft: 22)."
    )
    assert "went from 7.1 (sft) to 13.0" in cost
    assert "a cost" in cost
    assert "no policy was trained directly against gold" in trust
    page = render(replace(results, verdict=[first, answers, cost, trust]))
    picture = page.index(">Answers about strangers (60 prompts)<")
    assert picture < page.index("What was trained on what") < page.index("<h2>Scores")
    assert "http" not in page.replace("http://www.w3.org", "")


def test_differences_inside_the_noise_are_said_to_be_chance():
    ppo = policy_result(win_rate=rate("gold", 0.52, 0.4, 0.6), **truth((0.76, 0.2, 0.04), (0.1, 0.3, 0.6), NOISE))
    results = results_of(prompts=30, sft=policy_result(**SFT), ppo=ppo)
    first, answers, _, trust = verdict(results)
    assert first == "No policy is better than sft, judged by gold: ppo cannot be told apart from it."
    assert "(sft: 38, which may be chance)" in answers
    assert answers.endswith("; all of this may be chance.")
    assert "a small sample" in trust


def test_a_judge_that_favours_the_leader_is_said_in_the_first_line():
    ppo = policy_result(win_rate=rate("gold", 0.8, 0.7, 0.9))
    dpo = policy_result(win_rate=rate("gold", 0.6, 0.55, 0.65))
    results = results_of(rewards={"gold": ["ppo"]}, sft=policy_result(), ppo=ppo, dpo=dpo)
    assert heading(results) == "ppo is better than sft, by a judge that favours it"
    assert "But it was trained against this very judge, which flatters it. The best that was not: dpo." in verdict(results)[0]
    assert "favours ppo" in verdict(results)[-1]


def record(folder, **arguments):
    """Write a policy's record of its training by PPO; return the policy."""
    folder.mkdir()
    write_json(
        folder / "recipe.json", {"recipe": "ppo", "arguments": {"PPO": arguments}, "run": {"steps": 280, "wall_time_s": 180.0}}
    )
    return Policy(folder.name, str(folder))


def test_policies_that_records_name_count_as_trained_against_a_reward(tmp_path):
    function, folder = "rlhf_recipes.rewards.exact_match", str(tmp_path / "reward")
    policies = {"ppo": record(tmp_path / "ppo", reward_funcs=[{"path": folder}, function]), "base": Policy("base", None)}
    rewards = {
        "model": NamedReward("model", len, ["dpo"], folder, f"{tmp_path}/./reward"),
        "function": NamedReward("function", len, path=function),
        "other": NamedReward("other", len, path="rlhf_recipes.rewards.normalised_match"),
        "all": NamedReward("all", len, True, path=function),
    }
    trained = {name: reward.trained for name, reward in add_recorded_training(rewards, policies).items()}
    assert trained == {"model": ["dpo", "ppo"], "function": ["ppo"], "other": False, "all": True}


def test_what_the_record_of_a_policy_says_stands_in_the_report(tmp_path):
    record(tmp_path / "ppo", reward_funcs=[str(tmp_path / "reward")])
    whole, part = (read_training(folder) for folder in (tmp_path / "ppo", tmp_path / "ppo" / "checkpoint-10"))
    assert (part.steps, part.seconds) == (10, None)
    ppo = policy_result(adapter="x/ppo", training=whole, win_rate=rate("gold", 0.8, 0.7, 0.9))
    results = results_of(sft=policy_result(), ppo=ppo)
    results.rewards["gold"] = replace(results.rewards["gold"], folder=str(tmp_path / "reward"))
    assert "scored by gold; 280 steps in 3 min" in render(results)


def test_wins_at_equal_length_stand_beside_the_others():
    equal = Estimate(mean=0.52, interval=[0.4, 0.6], n=60, difference=Estimate(mean=0.02, interval=[-0.1, 0.1], n=60))
    ppo = policy_result(win_rate=replace(rate("gold", 0.8, 0.7, 0.9), equal_length=equal))
    results = results_of(sft=policy_result(), ppo=ppo)
    assert "If all answers were equally long, it would win 52 of 100, which may be chance." in verdict(results)[0]
    assert "wins at" in render(results)


def test_a_policy_that_may_be_as_good_is_named():
    one, other = (policy_result(win_rate=rate("gold", mean, mean - 0.05, mean + 0.05)) for mean in (0.8, 0.78))
    results = results_of(sft=policy_result(), ppo=one, dpo=other)
    assert heading(results) == "ppo is better than sft, and dpo may be as good"
    assert "Directly against" not in verdict(results)[0]
    clear = replace(other, leader_wins=rate("gold", 0.6, 0.55, 0.65))
    results = results_of(sft=policy_result(), ppo=one, dpo=clear)
    assert heading(results) == "ppo is the best of 3 policies"
    assert "Directly against dpo, the next: better in 60 of 100, worse in 40." in verdict(results)[0]


def wins_of(won, lost, n):
    """Return wins of n comparisons."""
    share = (won + (n - won - lost) / 2) / n
    return WinRate(judge="gold", win_rate=share, interval=[0.6, 1.0], n=n, prompts=n, ties=n - won - lost)


@pytest.mark.parametrize(
    ("wins", "words"),
    [
        (wins_of(39, 1, 40), "in 97 of 100 comparisons, equal in 0, worse in 3."),
        (wins_of(25, 15, 40), "in 63 of 100 comparisons, equal in 0, worse in 37."),
        (wins_of(998, 2, 1000), "in more than 99 of 100 comparisons, equal in 0, worse in fewer than 1."),
    ],
)
def test_wins_ties_and_losses_are_rounded_one_by_one(wins, words):
    assert words in verdict(results_of(sft=policy_result(), ppo=policy_result(win_rate=wins)))[0]


def test_an_unchanged_policy_is_said_and_has_moved_nowhere():
    same = policy_result(win_rate=rate("gold", 0.5, 0.4, 0.6), same_as="sft", adapter="x/same", kl=exactly(-0.001))
    first, cost, *_ = verdict(results_of(sft=policy_result(adapter="x/sft"), same=same))
    assert "same (it has exactly the weights of sft) cannot be told apart from it" in first
    assert "moved" not in cost
    hardly = replace(same, same_as=UNSET, kl=Estimate(mean=-0.001, interval=[-0.1, 0.1], n=60))
    cost = verdict(results_of(sft=policy_result(), hardly=hardly))[-2]
    assert "its answers hardly moved away from those of sft (KL: 0.0 nats" in cost


def test_a_twin_stands_where_its_twin_stands():
    ppo, twin = policy_result(win_rate=rate("gold", 0.55, 0.45, 0.65)), policy_result(win_rate=rate("gold", 0.7, 0.6, 0.8))
    results = results_of(sft=policy_result(), ppo=ppo, twin=replace(twin, same_as="ppo"))
    assert "twin (it has exactly the weights of ppo) and ppo cannot be told apart from it" in verdict(results)[0]
    better = results_of(sft=policy_result(), ppo=twin, twin=replace(twin, same_as="ppo"))
    assert heading(better) == "ppo is better than sft"


def test_policies_of_equal_weights_are_named_and_never_lead():
    wins = rate("gold", 0.9, 0.8, 1.0)
    same, again = (policy_result(win_rate=wins, same_as=name) for name in ("sft", "ppo"))
    results = results_of(sft=policy_result(), ppo=policy_result(win_rate=rate("gold", 0.7, 0.6, 0.8)), same=same, again=again)
    first, others, *_ = verdict(results)
    assert first.startswith("ppo is better than sft")
    assert "Also better: again (it has exactly the weights of ppo)." in others
    assert "No clear difference from sft: same (it has exactly the weights of sft)." in others


def test_without_a_judge_or_another_policy_nothing_is_called_better():
    alone = results_of(rewards={}, sft=policy_result(**SFT))
    assert verdict(alone)[:2] == [
        "sft is the only policy: there is nothing to compare it with.",
        "sft makes things up in 38 of 60 answers in the group 'not known'. "
        "Of 60 answers in the group 'known', 45 are right and 13 abstain.",
    ]
    results = results_of(rewards={}, sft=policy_result(), ppo=policy_result())
    assert verdict(results)[0].startswith("No reward or judge compared the answers")
    assert 'id="picture"' not in render(results)


def test_the_cost_is_told_of_what_was_trained_and_not_of_the_base():
    base = policy_result(win_rate=rate("gold", 0.2, 0.1, 0.3), perplexity=7.0)
    results = results_of(sft=policy_result(adapter="x/sft", perplexity=9.0), base=base)
    assert verdict(results)[-2].startswith("Cost of sft: perplexity on ordinary text is 9.0")


def test_wins_are_drawn_where_there_is_no_truth_and_warnings_stand_on_top():
    ppo = policy_result(win_rate=rate("gold", 0.7, 0.6, 0.8), ended=exactly(0.2))
    results = results_of(warnings=["nothing <ended>"], sft=policy_result(), ppo=ppo)
    page = render(replace(results, verdict=verdict(results)))
    assert "left: 60.0%; width: 20.0%" in page
    assert page.index("<b>warning:</b> nothing &lt;ended&gt;") < page.index('class="lead"')
    assert "most answers of ppo were cut off" in heading(results)
    assert "most answers of ppo were cut off before they ended" in verdict(results)[0]


@pytest.mark.parametrize(("after", "chance"), [(0.50, False), (0.58, True)])
def test_tasks_of_lm_eval_are_a_cost_beyond_their_errors(after, chance):
    def tasks(value):
        return {"arc_easy": {"acc,none": value, "acc_stderr,none": 0.02, "alias": "arc_easy"}}

    ppo = policy_result(win_rate=rate("gold", 0.7, 0.6, 0.8), lm_eval=tasks(after))
    cost = verdict(results_of(sft=policy_result(lm_eval=tasks(0.60)), ppo=ppo))[-2]
    assert f"arc_easy went from 60 to {100 * after:.0f} of 100 right" in cost
    assert (", which may be chance" in cost) == chance
