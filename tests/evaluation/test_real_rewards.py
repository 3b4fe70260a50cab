"""Reward models on real preferences, small: both ways of training; test_real_pipeline.py has `preferences.1100`."""

import json
import math
from collections import Counter
from importlib import import_module

from support import ROOT

import pytest

RANKINGS = "rankings.oasst_en100"


@pytest.fixture
def bench(monkeypatch):
    """`benchmarks/real_rewards.py`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("real_rewards")


def evaluation_and_record(folder):
    (result,) = json.loads((folder / "evaluation.json").read_text()).values()
    return result, json.loads((folder / "recipe.json").read_text())


@pytest.mark.parametrize(("name", "train_on"), [("hh_pairs", "pairs"), (RANKINGS, "rankings")])
def test_what_is_trained_and_measured_on_are_the_rows_that_people_compared(launch, tmp_path, shared, bench, name, train_on):
    options = {"train_on": train_on, "max_length": 128, "max_steps": 8, "logging_steps": 1, "learning_rate": 2e-3}
    if name == "hh_pairs":
        options["eval_datasets"] = [{"path": str(shared / "data" / "hh_pairs.eval.jsonl.gz"), "split": "train[:40]"}]
    config = bench.write_config(name, shared, 0, tmp_path, 60, **options, per_device_train_batch_size=4, eval_strategy="steps")
    status, error = launch("reward", "--config", config)
    assert status == 0, error
    result, record = evaluation_and_record(tmp_path)

    data, _ = bench.load_as_recipe(config)
    assert record["data"]["eval"]["rows"] == len(data.eval)
    compared = len(list(bench.pairs_of(data.eval)))
    assert result["accuracy"]["n"] == result["calibration"]["n"] == compared > 0
    assert result["tau"]["rankings"] == len(data.eval)

    losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
    assert len(losses) == 8
    assert all(map(math.isfinite, losses))


def test_the_trees_held_out_are_not_trained_on(tmp_path, shared, bench):
    bench.write_config(RANKINGS, shared, 0, tmp_path, 0)
    files = [(tmp_path / f"{split}.jsonl").read_text().splitlines() for split in ("train", "eval")]
    trees = [Counter(json.loads(line)["tree_id"] for line in lines) for lines in files]
    assert not trees[0].keys() & trees[1].keys()
    assert [len(counts) for counts in trees] == [75, 25]
    assert sum(map(len, files)) == 212
