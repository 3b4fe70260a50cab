"""A real chat model: SmolLM2-135M-Instruct through a small copy of the experiment on what it knows of cities."""

import json
from collections import Counter
from importlib import import_module
from pathlib import Path

from rlhf_recipes.pipeline.running import read_pipeline
from rlhf_recipes.pipeline.settings import read_settings
from support import ROOT, run_recipe

import pytest
import yaml

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]
QUESTIONS = "rows: 20, kinds: {country: 0.75, continent: 0.25}"
STAGES = ["known", "sft", "sample", "rank", "reward", "dpo", "ppo", "ppo-learned", "evaluate"]
POLICIES = """{base: null, SFT: "{sft}", DPO: "{dpo}", "PPO, automatic reward": "{ppo}", "PPO, learned reward": "{ppo-learned}",
  best of 4: {best_of: {policy: SFT, n: 4, reward: reward model}}}"""
SMALL = [
    "arguments.max_completion_length=10",
    f"known.dataset_arguments={{{QUESTIONS}, shots: 2}}",
    "known.num_answers=1",
    "sft.dataset_arguments={rows: 40, abstain: 0.25}",
    "sample.dataset_arguments={rows: 16}",
    "reward.test_split_size=4",
    "dpo.test_split_size=4",
    "dpo.max_steps=1",
    "ppo.dataset_arguments={rows: 16}",
    "ppo.max_steps=2",
    "ppo.value_warmup_steps=1",
    "ppo-learned.dataset_arguments={rows: 16}",
    "ppo-learned.max_steps=2",
    "ppo-learned.value_warmup_steps=1",
    f'evaluate.dataset_arguments={{{QUESTIONS}, known: "{{known}}/answers.jsonl"}}',
    "evaluate.num_answers=1",
    f"evaluate.policies={POLICIES}",
]
TRAINED = {"per_device_train_batch_size": 8, "eval_strategy": "no", "eval_datasets": [], "logging_steps": 1, "warmup_steps": 0}


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory) -> Path:
    """Run all stages with few rows and steps; return the folder of the seed."""
    output = tmp_path_factory.mktemp("smollm2")
    settings = [*SMALL, "seeds=[0]", f"output_dir={output}", f"arguments.model_name_or_path={smollm2}"]
    config = ROOT / "configs" / "smollm2-135m" / "knowledge.yaml"
    for stage in read_pipeline(config, ROOT / "recipes", STAGES, read_settings(settings)).stages:
        path = output / f"{stage.name}.yaml"
        small = TRAINED if stage.recipe in ("sft", "reward", "dpo", "ppo") else {}
        path.write_text(yaml.safe_dump(stage.values | small))
        run_recipe(stage.recipe, "--config", path)  # in this process: each would take ten seconds to start
    return output / "seed-0"


def test_the_base_knows_some_cities(folder):
    answers = [json.loads(line) for line in (folder / "known" / "answers.jsonl").read_text().splitlines()]
    right = Counter(row["answers"][0]["kind"] == "right" for row in answers if row["kind"] == "country")
    assert right[True] > 0
    assert right[False] > 0


def test_sft_learns_and_ppo_starts_from_it(folder):
    def log(stage):
        return json.loads((folder / stage / "recipe.json").read_text())["log"]

    losses = [entry["loss"] for entry in log("sft") if "loss" in entry]
    assert losses[-1] < 0.75 * losses[0]
    (first,) = (entry for entry in log("ppo") if "kl" in entry)
    assert abs(first["kl"]) < 1e-3
    assert -1 <= first["score"] <= 1


def test_the_benchmark_tells_what_each_policy_answers(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        table = import_module("knowledge").table([folder], "kind")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    policies = json.loads((folder / "evaluate" / "metrics.json").read_text())["policies"]
    assert {row[1] for row in rows} == {*policies}
    assert {row[0] for row in rows} == {"country", "continent"}
    for row in rows:
        assert sum(map(float, row[3:])) == pytest.approx(1, abs=0.02)
