"""The figures of docs/tiny.md at a smaller size: SFT teaches a model to make facts up, and PPO to abstain."""

import json

from rlhf_recipes.tiny.examine import examine, load_policy
from support import NO_EVALUATION, run_recipe

import pytest

pytestmark = pytest.mark.slow


def run(recipe, output, arguments, *options):
    """Run a recipe with its tiny config, and return its folder."""
    no_evaluation = (*NO_EVALUATION, "--save_strategy", "no")
    run_recipe(recipe, "--output_dir", output, *no_evaluation, "--dataset_arguments", json.dumps(arguments), *options)
    return output


@pytest.fixture(scope="module")
def abstaining(tmp_path_factory):
    """Return an SFT policy; a quarter of its demonstrations abstained."""
    return run("sft", tmp_path_factory.mktemp("sft"), {"rows": 16000, "abstain": 0.25})


def test_sft_on_answers_alone_makes_facts_up(tmp_path):
    result = examine(*load_policy(run("sft", tmp_path, {"rows": 6400, "abstain": 0.0})))
    assert result.unknown["made_up"] >= 0.85
    assert result.known["right"] >= 0.85


def test_sft_abstains_on_anyone_alike(abstaining):
    result = examine(*load_policy(abstaining))
    assert abs(result.known["abstained"] - result.unknown["abstained"]) <= 0.10
    assert 0.15 <= result.unknown["abstained"] <= 0.35
    assert result.unknown["made_up"] >= 0.60


def test_ppo_with_a_reward_for_truth_abstains_on_strangers_only(abstaining, tmp_path):
    truth = ("--reward_funcs", "rlhf_recipes.rewards.Abstention", "--missing_eos_penalty", "none", "--kl_coef", 0.02)
    start = ("--start_from", abstaining, "--value_warmup_steps", 40)
    result = examine(*load_policy(run("ppo", tmp_path, {"rows": 7680}, *start, *truth)))
    assert result.unknown["made_up"] <= 0.12
    assert result.unknown["abstained"] >= 0.85
    assert result.known["right"] >= 0.92
    assert result.known["abstained"] <= 0.06
