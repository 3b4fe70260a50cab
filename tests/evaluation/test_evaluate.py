"""recipes/evaluate.py, and its report."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from rlhf_recipes.core.files import ADAPTER
from rlhf_recipes.evaluation.measurement import Measurement
from rlhf_recipes.evaluation.report.html import render
from rlhf_recipes.evaluation.report.verdict import verdict
from rlhf_recipes.evaluation.reward_evaluation import measure_reward, write_evaluation
from rlhf_recipes.evaluation.types import EvaluationResults, from_json, to_json
from rlhf_recipes.models.weights import read_weights
from rlhf_recipes.rewards.saved import load_reward_adapter
from rlhf_recipes.tiny import splits
from support import NO_EVALUATION, ROOT
from support.chat_server import NOWHERE, chat_server
from support.evaluations import BASE, save_adapter, several_turns

import pytest
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An SFT policy, and a PPO run with a record, two checkpoints, and an incomplete one."""
    folder = tmp_path_factory.mktemp("runs")
    save_adapter(folder / "sft", 1)
    save_adapter(folder / "ppo", 2)
    for step in (10, 2, 11):
        save_adapter(folder / "ppo" / f"checkpoint-{step}", 2, size=0.01 * step)
        if step != 11:  # the run was killed while it saved this one
            (folder / "ppo" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    log = [{"step": step, "score": step / 10, "kl": 0.1} for step in range(5)]
    (folder / "ppo" / "recipe.json").write_text(json.dumps({"recipe": "ppo", "log": log}))
    return folder


def settings(runs, output, **values):
    """Write the tiny YAML file with these runs and few prompts; return its path."""
    content = yaml.safe_load((ROOT / "configs" / "tiny" / "evaluate.yaml").read_text())
    content["policies"] |= {"sft": str(runs / "sft"), "ppo": str(runs / "ppo")}
    del content["policies"]["dpo"]
    content["rewards"] = [{"path": f"rlhf_recipes.rewards.{name}"} for name in ("Abstention", "normalised_match")]
    content["judge"] = "Abstention"
    content["dataset_arguments"], content["ptx_dataset"][0]["arguments"] = {"rows": 16}, {"rows": 8}
    content |= {"frontier": [str(runs / "ppo")], "output_dir": str(output), "num_examples": 4, **values}
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def evaluated(runs, tmp_path_factory):
    """What the recipe wrote and printed, launched as a script, whose folder is first on Python's path."""
    output = tmp_path_factory.mktemp("evaluated") / "report"
    command = [sys.executable, ROOT / "recipes" / "evaluate.py", "--config", settings(runs, output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return json.loads((output / "metrics.json").read_text()), (output / "index.html").read_text(), done.stdout


def test_the_recipe_measures_every_policy(evaluated):
    metrics, _, _ = evaluated
    assert list(metrics["policies"]) == ["base", "sft", "best-of-4", "ppo"]
    assert list(metrics["rewards"]) == ["Abstention", "normalised_match"]
    assert metrics["rewards"]["Abstention"]["about"].startswith("Score a right answer 1")
    for name, policy in metrics["policies"].items():
        shares = [share["mean"] for share in policy["truthfulness"]["all"].values()]
        right, _, made_up = shares
        assert sum(shares) == pytest.approx(1)
        assert policy["rewards"]["Abstention"]["mean"] == pytest.approx(right - made_up)
        assert policy["rewards"]["normalised_match"]["mean"] == pytest.approx(right)
        assert ("win_rate" in policy) == (name != "sft")
        assert (policy.get("perplexity") is None) == (name == "best-of-4")
    assert metrics["policies"]["sft"]["kl"] == {"mean": 0.0, "interval": None, "n": 16}
    assert metrics["policies"]["best-of-4"]["kl"] == {
        "mean": pytest.approx(math.log(4) - 0.75),
        "interval": None,
        "bound": True,
    }
    assert metrics["policies"]["ppo"]["kl"]["mean"] > 0
    assert metrics["policies"]["best-of-4"]["rewards"]["Abstention"]["difference"]["mean"] > 0


def test_the_figures_are_means_over_the_answers_that_are_kept(evaluated):
    metrics, _, printed = evaluated
    page = Path(re.search("The report is (.*)", printed)[1])
    rows = [json.loads(line) for line in (page.parent / "answers.jsonl").read_text().splitlines()]
    for name, policy in metrics["policies"].items():
        answers = [answer for row in rows if row["policy"] == name for answer in row["answers"]]
        assert len(answers) == 16 * metrics["num_answers"]
        right = [answer["kind"] == "right" for answer in answers]
        assert sum(right) / len(right) == pytest.approx(policy["truthfulness"]["all"]["right"]["mean"])
        scores = [answer["scores"]["Abstention"] for answer in answers]
        assert sum(scores) / len(scores) == pytest.approx(policy["rewards"]["Abstention"]["mean"])
        if name != "best-of-4":
            entropy = -sum(answer["logp"] for answer in answers) / len(answers)
            assert entropy == pytest.approx(policy["entropy"]["mean"], abs=1e-4)
    assert {"prompt", "reference", "known"} <= set(rows[0])


def test_the_frontier_shows_complete_checkpoints_in_order(evaluated):
    frontier = evaluated[0]["frontier"]
    (points,) = frontier["runs"].values()
    assert [point["step"] for point in points] == [2, 10]
    assert points[0]["kl"]["mean"] != points[1]["kl"]["mean"]
    assert [point["n"] for point in frontier["best_of"]] == [1, 2, 4]
    scores = [point["rewards"]["Abstention"]["mean"] for point in frontier["best_of"]]
    assert scores == sorted(scores)


def test_the_report_is_one_complete_file(evaluated):
    metrics, page, printed = evaluated
    assert page.count("<svg") == 2 + 2 + 2  # frontiers, diagrams, two curves of the run with a record
    for sentence in metrics["verdict"]:
        assert sentence in printed
    for words in ("Judged by Abstention", "Inside the noise", "best-of-4", "prefers-color-scheme: dark", "width=device-width"):
        assert words in page
    for example in metrics["examples"]:
        assert example["prompt"] in page
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!#)[^"']*|url\((?!#)[^)]*|@import|<script|<link""", page)
    assert not outside


def test_results_survive_json(evaluated):
    results = from_json(EvaluationResults, evaluated[0])
    assert to_json(results) == evaluated[0]
    assert render(results) == evaluated[1]


def test_the_report_escapes_names_and_texts(evaluated):
    metrics = json.loads(json.dumps(evaluated[0]))
    evil = "<script>alert('$x_1$')</script>"
    metrics["policies"][evil] = metrics["policies"].pop("ppo")
    metrics["rewards"][evil] = metrics["rewards"]["Abstention"]
    for policy in metrics["policies"].values():
        policy["rewards"][evil] = policy["rewards"]["Abstention"]
    for points in (*metrics["frontier"]["runs"].values(), metrics["frontier"]["best_of"]):
        for point in points:
            point["rewards"][evil] = point["rewards"]["Abstention"]
    metrics["examples"][0] |= {"prompt": evil, "reference": evil, "group": evil}
    metrics["examples"][0]["answers"]["base"]["text"] = evil
    results = from_json(EvaluationResults, metrics)
    page = render(replace(results, verdict=verdict(results)))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 8


def test_runs_of_one_name_are_told_apart_on_the_frontier(evaluated):
    metrics = json.loads(json.dumps(evaluated[0]))
    (points,) = metrics["frontier"]["runs"].values()
    metrics["frontier"]["runs"] = {"runs/a/ppo": points, "runs/b/ppo": points, "runs/b/dpo": points}
    page = render(from_json(EvaluationResults, metrics))
    for name in ("a/ppo", "b/ppo", "b/dpo"):
        assert page.count(f">{name}<") == 2  # in the picture of each reward
    metrics["frontier"]["runs"] = {"runs/a/ppo": points}
    assert ">ppo<" in render(from_json(EvaluationResults, metrics))


def test_numbers_are_reproducible(evaluated, runs, tmp_path, launch):
    config = settings(runs, tmp_path / "again", frontier=[], frontier_best_of=[], ptx_dataset=[])
    status, message = launch("evaluate", "--config", config)
    assert status == 0, message
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    for name, policy in metrics["policies"].items():
        assert policy["rewards"] == evaluated[0]["policies"][name]["rewards"]
        assert policy["truthfulness"] == evaluated[0]["policies"][name]["truthfulness"]
    assert metrics["frontier"] is None
    assert "Reward against KL" not in (tmp_path / "again" / "index.html").read_text()


def test_policies_of_equal_weights_and_answers_without_eos_are_said_in_warnings(runs, tmp_path, launch):
    untrained = shutil.copytree(runs / "sft", tmp_path / "untrained")
    weights = {name: weight * ("lora_B" not in name) for name, weight in read_weights(untrained / ADAPTER).items()}
    save_file(weights, untrained / ADAPTER)
    again = shutil.copytree(runs / "ppo", tmp_path / "again", ignore=shutil.ignore_patterns("checkpoint-*"))
    record = {
        "recipe": "ppo",
        "arguments": {"PPOArguments": {"reward_funcs": ["x.y"]}, "PPOConfig": {"max_completion_length": 8}},
    }
    (again / "recipe.json").write_text(json.dumps(record))
    policies = {
        "base": None,
        "sft": str(runs / "sft"),
        "untrained": str(untrained),
        "ppo": str(runs / "ppo"),
        "again": str(again),
    }
    few = {"policies": policies, "frontier": [], "frontier_best_of": [], "ptx_dataset": [], "max_completion_length": 1}
    status, message = launch("evaluate", "--config", settings(runs, tmp_path / "same", **few))
    assert status == 0, message
    wanted = [
        "max_completion_length: 1: again was trained on answers of up to 8 tokens. Fix: set it to 8, or train with 1",
        "policies: untrained has exactly the weights of base, so",
        "policies: again has exactly the weights of ppo, so",
        "policies: no answer of any policy ended with EOS: all were cut off at `max_completion_length: 1`. Fix: ",
    ]
    metrics = json.loads((tmp_path / "same" / "metrics.json").read_text())
    assert len(metrics["warnings"]) == len(wanted)
    for text in wanted:
        lines = [line for line in message.splitlines() if line.startswith("warning: ") and text in line]
        assert len(lines) == 2, "once when it is found, once at the end"
        assert any(text in warning for warning in metrics["warnings"])
    assert {name: policy.get("same_as") for name, policy in metrics["policies"].items()} == (
        dict.fromkeys(policies) | {"untrained": "base", "again": "ppo"}
    )


def test_a_policy_that_hardly_changed_is_named(runs, tmp_path, launch):
    barely = shutil.copytree(runs / "sft", tmp_path / "barely")
    weights = {name: weight * (1 + 1e-5) for name, weight in read_weights(barely / ADAPTER).items()}
    save_file(weights, barely / ADAPTER)
    few = {"frontier": [], "frontier_best_of": [], "ptx_dataset": []}
    policies = {"sft": str(runs / "sft"), "barely": str(barely), "ppo": str(runs / "ppo")}
    status, message = launch("evaluate", "--config", settings(runs, tmp_path / "report", policies=policies, **few))
    assert status == 0, message
    assert "policies: barely hardly differs from sft" in message
    assert "ppo hardly differs" not in message


def test_a_chat_model_may_be_the_judge(runs, tmp_path, launch):
    with chat_server(lambda question: "[[A]]") as (url, seen):
        judge = {"url": url, "model": "a-model", "max_pairs": 3}
        few = {"policies": {"base": None, "sft": str(runs / "sft")}, "frontier": [], "frontier_best_of": [], "ptx_dataset": []}
        status, message = launch("evaluate", "--config", settings(runs, tmp_path / "judged", **few, judge=judge))
    assert status == 0, message
    rate = json.loads((tmp_path / "judged" / "metrics.json").read_text())["policies"]["base"]["win_rate"]
    assert (rate["judge"], rate["win_rate"], rate["swayed"], rate["n"]) == ("a-model", 0.5, 1.0, 3)
    assert len(seen) == 1 + 6  # the first checks that it answers
    assert "the order changed the winner in 100%" in (tmp_path / "judged" / "index.html").read_text()


def test_several_turns_on_a_4_bit_base(runs, tmp_path, launch):
    prompts, file = several_turns(6), tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "reference": "Larkhill."}) + "\n" for prompt in prompts))
    few = {"frontier": [str(runs / "ppo")], "frontier_best_of": [2], "ptx_dataset": [], "group_by": None}
    data = {"dataset_name": str(file), "dataset_arguments": None, "max_prompt_length": 128}
    config = settings(runs, tmp_path / "talks", **few, **data, load_in_4bit=True)
    status, message = launch("evaluate", "--config", config)
    assert status == 0, message
    metrics = json.loads((tmp_path / "talks" / "metrics.json").read_text())
    assert (metrics["prompts"], metrics["policies"]["sft"]["kl"]["mean"]) == (6, 0)
    assert metrics["policies"]["ppo"]["kl"]["mean"] > 0.05
    assert metrics["policies"]["best-of-4"]["win_rate"]["prompts"] == 6
    assert metrics["examples"][0]["prompt"].startswith("user: ")
    assert "\nassistant: I do not know.\nuser: " in metrics["examples"][0]["prompt"]
    assert [point["step"] for point in metrics["frontier"]["runs"][str(runs / "ppo")]] == [2, 10]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compare_with": "nobody"}, "compare_with: 'nobody'"),
        ({"kl_reference": "best-of-4"}, "kl_reference: 'best-of-4'"),
        ({"frontier": ["no/ppo"]}, "frontier, entry 1: no/ppo"),
        ({"lm_eval_tasks": ["arc_easy"]}, "lm_eval_tasks: "),
        ({"rewards": ["no/reward"]}, "rewards, entry 1: no/reward"),
        ({"rewards": [{"path": "rlhf_recipes.rewards.Abstention", "trained": 1}]}, "rewards, entry 1: trained: "),
        ({"rewards": ["rlhf_recipes.rewards.exact_match"] * 2}, "rewards, entry 2: .*'exact_match'"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"polices": {}}, "'polices'.*'policies'"),
        ({"judge": "nobody"}, "judge: 'nobody'"),
        ({"group_names": {"unknown": "x"}}, "group_names: 'unknown' is no group. Fix: name one of all, known, not known"),
        ({"judge": {"url": "localhost", "model": "m"}}, "judge: url: "),
        ({"judge": {"url": NOWHERE, "model": "m", "retries": 0}}, "judge: http://127.0.0.1:9/v1"),
        ({"judge": {"url": NOWHERE, "model": "m", "api_key_env": "NO_SUCH_KEY"}}, "judge: api_key_env: .*NO_SUCH_KEY"),
        (
            {
                "policies": {"base": None, "best": {"best_of": {"policy": "base", "n": 2, "reward": "gold"}}},
                "compare_with": "base",
            },
            "policies: best: best_of: reward: 'gold'",
        ),
        (
            {"policies": {"base": None, "best": {"best_of": {"policy": "base", "n": 2}}}}
            | {"compare_with": "base", "rewards": [], "judge": None},
            "policies: best: best_of: reward: None",
        ),
    ],
)
def test_mistakes_are_one_message_before_anything_is_sampled(values, message, runs, tmp_path, launch, monkeypatch):
    monkeypatch.setattr(Measurement, "sample", lambda *arguments: pytest.fail("something was sampled"))
    status, error = launch("evaluate", "--config", settings(runs, tmp_path / "wrong", **values))
    assert status == 2
    assert re.search(message, error)
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_model_name_or_path": "somebody/else"}, "policies: other: .*somebody/else"),
        ({"task_type": "SEQ_CLS"}, "policies: other: .*SEQ_CLS"),
    ],
)
def test_an_adapter_of_another_base_or_a_reward_model_is_no_policy(values, message, runs, tmp_path, launch):
    other = shutil.copytree(runs / "sft", tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | values))
    path = settings(runs, tmp_path / "wrong", policies={"sft": str(runs / "sft"), "other": str(other)}, frontier=[])
    status, error = launch("evaluate", "--config", path)
    assert status == 2
    assert re.search(message, error)


def test_a_reward_model_scores_and_chooses_and_its_evaluation_is_shown(tmp_path, launch):
    """On the base alone, without a policy adapter."""
    options = ("--max_steps", 2, "--per_device_train_batch_size", 4, "--save_strategy", "no", *NO_EVALUATION)
    rows = ("--dataset_name", "rlhf_recipes.tiny.splits.rankings", "--dataset_arguments", '{"rows": 32, "k": 4}')
    rows += ("--test_split_size", 8)
    status, message = launch("reward", "--output_dir", tmp_path / "reward", *options, *rows)
    assert status == 0, message
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    reward = load_reward_adapter(model, tmp_path / "reward", "reward", tokenizer)
    write_evaluation(tmp_path / "reward", {"reward": measure_reward(reward, splits.rankings("test", rows=8))})
    values = {
        "policies": {"base": None, "best": {"best_of": {"policy": "base", "n": 3, "reward": "model"}}},
        "rewards": [{"path": str(tmp_path / "reward"), "name": "model", "trained": True}],
        "compare_with": "base",
        "judge": None,
        "frontier": [],
        "ptx_dataset": [],
    }
    status, message = launch("evaluate", "--config", settings(tmp_path, tmp_path / "report", **values))
    assert status == 0, message
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["policies"]["best"]["rewards"]["model"]["difference"]["mean"] > 0
    assert metrics["policies"]["best"]["win_rate"]["judge"] == "model"
    assert "model: reward: accuracy" in (tmp_path / "report" / "index.html").read_text()
