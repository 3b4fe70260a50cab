"""Every recipe, a few steps each on the tiny base, as a user launches it: `make smoke`.

The stages go on from one another, so they are one test. The pipeline of `make demo` has the same stages at full length.
"""

import io
import json

from support import NO_EVALUATION, ROOT, run_recipe

import pytest

TRAIN = ("--max_steps", 2, "--save_strategy", "no", *NO_EVALUATION, "--warmup_steps", 0, "--logging_steps", 1)
ROWS = ("--dataset_arguments", '{"rows": 32}')


@pytest.mark.smoke
def test_every_recipe_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # configurations name other files relative to it
    sft, reward, groups = tmp_path / "sft", tmp_path / "reward", tmp_path / "sample"

    run_recipe("sft", *TRAIN, *ROWS, "--max_steps", 30, "--output_dir", sft)
    few = (*ROWS, "--max_completion_length", 8)
    run_recipe("sample", *few, "--policies", json.dumps({"sft": str(sft)}), "--output_dir", groups)
    run_recipe("label", "--data", groups / "groups.jsonl", "--agreement")
    run_recipe("rank", "--groups", groups, "--output_dir", tmp_path / "rank")
    rankings = ("--datasets", tmp_path / "rank" / "rankings.jsonl", "--test_split_size", 2)
    start = ("--start_from", sft)
    run_recipe("reward", *TRAIN, *rankings, *start, "--output_dir", reward)
    run_recipe("dpo", *TRAIN, *rankings, *start, "--output_dir", tmp_path / "dpo")
    ppo = ("--value_warmup_steps", 1, "--reward_funcs", reward, "--output_dir", tmp_path / "ppo")
    run_recipe("ppo", *TRAIN, *ROWS, *start, *ppo)

    few += ("--policies", json.dumps({"base": None, "sft": str(sft), "ppo": str(tmp_path / "ppo")}), "--num_answers", 1)
    run_recipe("evaluate", *few, "--frontier", "[]", "--ptx_dataset", "[]", "--output_dir", tmp_path / "report")
    run_recipe("merge", "--adapter", tmp_path / "ppo", "--output_dir", tmp_path / "merged")
    monkeypatch.setattr("sys.stdin", io.StringIO("Where does Lisano live?\n"))
    run_recipe("chat", *few[-4:-2], "--max_new_tokens", 8)
    run_recipe("plan", "--config", "configs/tiny/pipeline.yaml")
    run_recipe("pipeline", "--config", "configs/tiny/pipeline.yaml", "--dry-run")

    for path in (sft, reward, tmp_path / "dpo", tmp_path / "ppo"):
        assert json.loads((path / "recipe.json").read_text())["run"]["steps"] in (2, 30)
    assert (tmp_path / "rank" / "rankings.jsonl").stat().st_size
    assert (tmp_path / "report" / "index.html").stat().st_size
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size
