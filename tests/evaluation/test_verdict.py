"""The verdict in words."""

from rlhf_recipes.evaluation.report.verdict import verdict
from rlhf_recipes.evaluation.types import BestOf, Estimate, WinRate
from support.evaluations import evaluation_results, exactly, policy_result

import pytest


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
