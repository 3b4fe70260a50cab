"""Reward models on real preferences, small: `stories3M` against a bag of words, and both ways of training from end to end."""

import json
import math
import statistics
from collections import Counter
from importlib import import_module

from rlhf_recipes.evaluation.rewards import measure_reward

import pytest
from conftest import ROOT

RANKINGS = "rankings.oasst_en100"


@pytest.fixture
def bench(monkeypatch):
    """`benchmarks/real_rewards.py`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("real_rewards")


def evaluation_and_record(folder):
    (result,) = json.loads((folder / "evaluation.json").read_text()).values()
    return result, json.loads((folder / "recipe.json").read_text())


def test_polite_answers_are_told_from_rude_ones_about_as_well_as_by_their_words(launch, tmp_path, shared, bench):
    """One model and two epochs; the benchmark has three of each, and more seeds."""
    options = {"ensemble_size": 1, "num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 500}
    config = bench.write_config("preferences.1100", shared, 0, tmp_path, 0, **options)
    status, error = launch("reward", "--config", config)
    assert status == 0, error
    model, record = evaluation_and_record(tmp_path)

    data, tokenizer = bench.load_as_recipe(config)
    bag = bench.BagOfWords(data.train, tokenizer)
    words = measure_reward(bag, data.eval)
    # the same rows, and a baseline that is one
    assert record["data"]["train"]["rows"] == len(data.train)
    assert record["data"]["eval"]["rows"] == model["accuracy"]["n"] == words["accuracy"]["n"] == len(data.eval)
    assert words["accuracy"]["accuracy"] > 0.88
    assert model["accuracy"]["accuracy"] > 0.85
    gains = bench.gains(config, bag, data.eval)
    assert statistics.fmean(gains) == pytest.approx(model["accuracy"]["accuracy"] - words["accuracy"]["accuracy"])
    margin = 2 * statistics.stdev(gains) / math.sqrt(len(gains))
    assert statistics.fmean(gains) + margin > 0, "the bag of words is better, and not by chance"
    # politeness, not length: to prefer the longer answer is a coin toss here
    assert abs(model["length_accuracy"] - 0.5) < 0.1


@pytest.mark.parametrize(("name", "train_on"), [("hh_pairs", "pairs"), (RANKINGS, "rankings")])
def test_human_preferences_are_learnt_from(launch, tmp_path, shared, bench, name, train_on):
    options = {"train_on": train_on, "max_length": 128, "max_steps": 16, "logging_steps": 1, "learning_rate": 2e-3}
    if name == "hh_pairs":
        options["eval_datasets"] = [{"path": str(shared / "data" / "hh_pairs.eval.jsonl.gz"), "split": "train[:100]"}]
    config = bench.write_config(name, shared, 0, tmp_path, 120, **options, per_device_train_batch_size=4, eval_strategy="steps")
    status, error = launch("reward", "--config", config)
    assert status == 0, error
    result, record = evaluation_and_record(tmp_path)

    data, _ = bench.load_as_recipe(config)
    assert len(data.train) <= 64, "few enough to be seen again"
    assert record["data"]["eval"]["rows"] == len(data.eval)
    compared = len(list(bench.pairs_of(data.eval)))
    assert result["accuracy"]["n"] == result["calibration"]["n"] == compared > 0
    assert result["tau"]["rankings"] == len(data.eval)

    losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
    assert len(losses) == 16
    assert all(map(math.isfinite, losses))


def test_the_trees_held_out_are_not_trained_on(tmp_path, shared, bench):
    bench.write_config(RANKINGS, shared, 0, tmp_path, 0)
    files = [(tmp_path / f"{split}.jsonl").read_text().splitlines() for split in ("train", "eval")]
    trees = [Counter(json.loads(line)["tree_id"] for line in lines) for lines in files]
    assert not trees[0].keys() & trees[1].keys()
    assert [len(counts) for counts in trees] == [75, 25]
    assert sum(map(len, files)) == 212
