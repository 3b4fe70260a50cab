"""The figures of docs/tiny.md at a smaller size: what SFT does to a model that knows whom it knows, and what PPO repairs."""

import json

from rlhf_recipes.tiny.examine import examine, load_policy
from support import run_recipe

import pytest

pytestmark = pytest.mark.slow


def run(recipe, output, arguments, *options):
    """A recipe with its tiny config; its folder."""
    unwatched = ("--eval_strategy", "no", "--save_strategy", "no")
    run_recipe(recipe, "--output_dir", output, *unwatched, "--dataset_arguments", json.dumps(arguments), *options)
    return output


@pytest.fixture(scope="module")
def abstaining(tmp_path_factory):
    """An SFT policy, of whose demonstrations a quarter abstained."""
    return run("sft", tmp_path_factory.mktemp("sft"), {"rows": 16000, "abstain": 0.25})


def test_sft_on_answers_alone_teaches_to_make_things_up(tmp_path):
    result = examine(*load_policy(run("sft", tmp_path, {"rows": 6400, "abstain": 0.0})))
    assert result.unknown["made_up"] >= 0.85
    assert result.known["right"] >= 0.85


def test_sft_cannot_teach_whom_to_abstain_on(abstaining):
    result = examine(*load_policy(abstaining))
    assert abs(result.known["abstained"] - result.unknown["abstained"]) <= 0.10
    assert 0.15 <= result.unknown["abstained"] <= 0.35
    assert result.unknown["made_up"] >= 0.60


def test_ppo_with_a_reward_for_truth_does_in_two_fifths_of_the_usual_steps(abstaining, tmp_path):
    result = examine(*load_policy(run("ppo", tmp_path, {"rows": 7680}, "--start_from", abstaining)))
    assert result.unknown["made_up"] <= 0.12
    assert result.unknown["abstained"] >= 0.85
    assert result.known["right"] >= 0.92
    assert result.known["abstained"] <= 0.06
