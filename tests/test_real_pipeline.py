"""The main job on real input, small: SFT, two reward models, PPO, DPO and the report of `stories3M`, by the pipeline."""

import json
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import ROOT

SMALL = {
    "sft": {"num_train_epochs": 1},
    "reward": {"num_train_epochs": 2},
    "judge": {"num_train_epochs": 2},
    "ppo": {
        "per_device_train_batch_size": 32,
        "max_steps": 40,
        "max_completion_length": 24,
        "value_warmup_steps": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
    },
    "dpo": {"num_train_epochs": 1},
    "evaluate": {"max_completion_length": 24, "num_answers": 2, "frontier": [], "frontier_best_of": []},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory, shared):
    """What the evaluation measured, and the page."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        options = {name: dict(values) for name, values in SMALL.items()}
        config = import_module("real_pipeline").write_pipeline(shared, folder, [0], 1, **options)
    command = [sys.executable, ROOT / "recipes" / "pipeline.py", "--config", config]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    evaluated = folder / "seed-0" / "evaluate"
    return json.loads((evaluated / "metrics.json").read_text()), (evaluated / "index.html").read_text()


def test_the_learned_reward_rises(results):
    rewards = {name: policy["rewards"]["reward model"] for name, policy in results[0]["policies"].items()}
    for name in ("ppo", "dpo", "best-of-4"):
        assert rewards[name]["difference"]["interval"][0] > 0, name
    assert results[0]["policies"]["ppo"]["kl"]["mean"] > 0


def test_policies_win_against_sft_by_a_reward_that_none_was_trained_against(results):
    """By another reward model, trained on other pairs."""
    rates = {name: policy["win_rate"] for name, policy in results[0]["policies"].items() if name != "sft"}
    assert {rate["judge"] for rate in rates.values()} == {"other reward model"}
    for name in ("ppo", "dpo"):
        assert rates[name]["interval"][0] > 0.5, (name, rates[name])


def test_the_report_shows_it(results):
    metrics, page = results
    assert metrics["verdict"][0] in page.replace("&#39;", "'")
    rate = metrics["policies"]["ppo"]["win_rate"]["win_rate"]
    assert f"{rate:.0%}" in page
    assert page.count("<svg") >= 4, "learning curves of the policies and reward models"
    assert "Made up" not in page, "of free text nobody can tell"
