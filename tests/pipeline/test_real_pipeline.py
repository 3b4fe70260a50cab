"""A small pipeline on real data: SFT, two reward models, PPO, DPO and the report of `stories3M`."""

import json
import math
import statistics
from importlib import import_module

from rlhf_recipes.evaluation.reward_evaluation import measure_reward
from rlhf_recipes.pipeline.running import read_pipeline
from support import ROOT, run_recipe

import pytest
import yaml

pytestmark = [pytest.mark.real, pytest.mark.slow]


STORIES = {  # of all stages
    "dtype": "float32",
    "eos_token": "<s>",  # ends a story; the model has never seen </s>
    "max_length": 128,
    "max_prompt_length": 64,
    "max_completion_length": 24,
    "eval_strategy": "no",
    "save_strategy": "no",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}
REWARD = {"num_train_epochs": 2, "learning_rate": 5e-4, "weight_decay": 0.1, "lora_dropout": 0.1, "ensemble_size": 1}


@pytest.fixture(scope="module")
def benchmarks():
    """Import `benchmarks/preferences.py` and `benchmarks/real_rewards.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return import_module("preferences"), import_module("real_rewards")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared, benchmarks):
    """Run the stages with shorter answers, fewer steps and rows than the benchmark; return the output folder."""
    output = tmp_path_factory.mktemp("real")
    instructions, pairs, hh, stories = (
        str(shared / "data" / f"{name}.jsonl.gz")
        for name in ("instructions.1100", "preferences.1100", "hh_pairs.train", "tinystories.1000")
    )
    small = {
        "sft": {
            "datasets": [{"path": instructions, "split": "train[:320]"}, {"path": hh, "split": "train[:80]"}],
            "learning_rate": 2e-3,
        },
        "reward": {**REWARD, "eval_strategy": "epoch", "datasets": [{"path": pairs, "split": "train[:320]"}]},
        "judge": {**REWARD, "datasets": [{"path": pairs, "split": "train[475:635]"}]},
        "dpo": {"datasets": [{"path": pairs, "split": "train[:240]"}], "learning_rate": 5e-4},
        "ppo": {
            "datasets": [{"path": pairs, "split": "train[:950]"}],
            "per_device_train_batch_size": 48,
            "max_steps": 12,
            "warmup_steps": 2,
            "value_warmup_steps": 2,
            "learning_rate": 2e-3,
            "kl_coef": 0.03,
        },
        "evaluate": {
            "policies": {"SFT": "{sft}", "DPO": "{dpo}", "PPO": "{ppo}"},
            "eval_datasets": [{"path": pairs, "split": "train[950:990]"}],
            "frontier": [],
            "frontier_best_of": [],
            "ptx_dataset": [{"path": stories, "split": "train[:10]"}],
        },
    }
    model = str(shared / "models" / "stories3M")
    config = benchmarks[0].write_pipeline(model, shared, output, [0], "polite", STORIES, **small)
    for stage in read_pipeline(config, ROOT / "recipes").stages:  # in this process: each would take ten seconds to start
        path = output / "configs" / f"{stage.name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(stage.values))
        run_recipe(stage.recipe, "--config", path)
    return output


@pytest.fixture(scope="module")
def metrics(folder):
    """Read the metrics of the evaluation."""
    return json.loads((folder / "seed-0" / "evaluate" / "metrics.json").read_text())


def test_reward_model_is_about_as_accurate_as_a_bag_of_words(folder, shared, benchmarks):
    """Compare one model on half of the rows; `benchmarks/real_rewards.py` has three on all rows, and more seeds."""
    benchmark, reward = benchmarks[1], folder / "seed-0" / "reward"
    (model,) = json.loads((reward / "evaluation.json").read_text()).values()
    record = json.loads((reward / "recipe.json").read_text())
    data, tokenizer = benchmark.load_as_recipe(folder / "configs" / "reward-0.yaml")
    bag = benchmark.BagOfWords(data.train, tokenizer)
    words = measure_reward(bag, data.eval)
    # the same rows, and a baseline that is no straw man
    assert record["data"]["train"]["rows"] == len(data.train)
    assert record["data"]["eval"]["rows"] == model["accuracy"]["n"] == words["accuracy"]["n"] == len(data.eval)
    assert words["accuracy"]["accuracy"] > 0.85
    assert model["accuracy"]["accuracy"] > 0.80
    gains = benchmark.gains(reward, shared / "models" / "stories3M", bag, data.eval)
    assert statistics.fmean(gains) == pytest.approx(model["accuracy"]["accuracy"] - words["accuracy"]["accuracy"])
    margin = 2 * statistics.stdev(gains) / math.sqrt(len(gains))
    assert statistics.fmean(gains) + margin > 0, "the bag of words is better, and not by chance"
    # it scores politeness, not length
    assert abs(model["length_accuracy"] - 0.5) < 0.1


def test_the_learned_reward_rises(metrics):
    rewards = {name: policy["rewards"]["reward model"] for name, policy in metrics["policies"].items()}
    for name in ("PPO", "DPO"):
        assert rewards[name]["difference"]["interval"][0] > 0, name
    assert metrics["policies"]["PPO"]["kl"]["mean"] > 0


def test_policies_win_against_sft_by_another_reward_model(metrics):
    """It was trained on other pairs, and no policy was trained against it."""
    rates = {name: policy["win_rate"] for name, policy in metrics["policies"].items() if name != "SFT"}
    assert {rate["judge"] for rate in rates.values()} == {"other reward model"}
    for name in ("PPO", "DPO"):
        assert rates[name]["interval"][0] > 0.5, (name, rates[name])


def test_the_report_shows_the_results(folder, metrics):
    page = (folder / "seed-0" / "evaluate" / "index.html").read_text()
    assert metrics["verdict"][0] in page.replace("&#39;", "'")
    rate = metrics["policies"]["PPO"]["win_rate"]["win_rate"]
    assert f"{rate:.0%}" in page
    assert page.count("<svg") >= 4, "learning curves of the policies and reward models"
    assert "made up" not in page.lower(), "nobody can tell of free text"


def test_the_benchmark_prints_its_tables(folder, benchmarks, metrics):
    seeds = [folder / "seed-0"]
    models, policies = benchmarks[0].rewards(seeds), benchmarks[0].policies(seeds)
    (model,) = json.loads((seeds[0] / "reward" / "evaluation.json").read_text()).values()
    assert f"| 0 | reward | {model['accuracy']['n']} | {model['accuracy']['accuracy']:.3f} [" in models
    assert "| 0 | judge | " in models
    line = next(line for line in policies.splitlines() if line.startswith("| PPO"))
    rate = metrics["policies"]["PPO"]["win_rate"]
    assert f"| {rate['win_rate']:.2f} | {rate['equal_length']['mean']:.2f} |" in line
    instructions = json.loads((seeds[0] / "instructions" / "metrics.json").read_text())["policies"]["PPO"]["perplexity"]
    assert line.endswith(f"{instructions:.1f} |")
