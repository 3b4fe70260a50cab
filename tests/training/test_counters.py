"""Resumed runs log what unbroken ones do, and end with the same weights."""

import json
import shutil

from rlhf_recipes.stages import training_stages
from rlhf_recipes.training.result import RunRecorder
from rlhf_recipes.training.resume import ARGUMENTS
from rlhf_recipes.training.trainers import COUNTERS
from support.small_stages import small, without_times

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerState


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return YAML files of small stages, which log every two steps and save a checkpoint at each."""
    folder = tmp_path_factory.mktemp("counting")
    files = small(folder)
    for name in training_stages():
        values = files[name] | {"save_total_limit": 9, "ensemble_size": 1}
        if name != "reward":
            del values["ensemble_size"]
        if "start_from" in values:
            values |= {"start_from": None, "lora_target_modules": "all-linear", "lora_r": 4}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


def run(launch, folder, recipe, output, *options):
    status, error = launch(recipe, "--config", folder / f"{recipe}.yaml", "--output_dir", output, *options)
    assert status == 0, error


def logs(output):
    """Return the log of the record, that of `log.jsonl`, and the metrics, without times."""
    record = json.loads((output / "recipe.json").read_text())
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return without_times({"log": record["log"], "metrics": record["metrics"], "lines": lines})


@pytest.mark.parametrize("recipe", training_stages())
def test_resumed_run_equals_unbroken_one(launch, folder, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(RunRecorder, "on_train_end", lambda meter, *_, **__: setattr(meter, "wall_time", 10.0))
    whole = tmp_path / "whole"
    run(launch, folder, recipe, whole)
    expected = logs(whole)
    last = expected["log"][-1]["step"]
    weights = "adapter_model.safetensors"
    assert "train_loss" in expected["metrics"]
    assert expected["metrics"]["num_tokens"] > 0
    for step in (1, last):  # between two lines of the log; after the last step
        broken = tmp_path / f"broken-{step}"
        shutil.copytree(whole / f"checkpoint-{step}", broken / f"checkpoint-{step}")
        run(launch, folder, recipe, broken, "--resume_from_checkpoint", "true")
        assert logs(broken) == expected, f"resumed at step {step}"
        saved, unbroken = (load_file(folder / weights) for folder in (broken, whole))
        assert all(torch.equal(value, saved[name]) for name, value in unbroken.items()), f"resumed at step {step}"
        rate = json.loads((broken / "recipe.json").read_text())["run"]
        assert rate["steps"] == last - step
        if rate["steps"]:
            assert 0 < 10 * rate["tokens_per_s"] < expected["metrics"]["num_tokens"], "of the steps of this process"


def test_missing_counters_start_at_zero_and_damaged_ones_are_one_message(launch, folder, tmp_path):
    whole = tmp_path / "whole"
    run(launch, folder, "sft", whole)
    counts = whole / "checkpoint-1" / COUNTERS.format(0)
    for content in ("{", "[]", '{"loss": 1}', json.dumps(json.loads(counts.read_text()) | {"metrics": []})):
        counts.write_text(content)
        options = ("--output_dir", tmp_path / "damaged", "--resume_from_checkpoint", whole / "checkpoint-1")
        status, error = launch("sft", "--config", folder / "sft.yaml", *options)
        assert status == 2
        assert f"checkpoint-1/{counts.name}" in error
        assert "Traceback" not in error
    counts.unlink()
    run(launch, folder, "sft", tmp_path / "without", "--resume_from_checkpoint", whole / "checkpoint-1")


def test_trainer_state_is_saved_after_arguments_and_counters(launch, folder, tmp_path, monkeypatch):
    """Killed in between, a run could be resumed with other arguments."""

    class Killed(BaseException):
        """An error that no recipe catches."""

    def killed(*_):
        raise Killed

    monkeypatch.setattr(TrainerState, "save_to_json", killed)
    with pytest.raises(Killed):
        run(launch, folder, "sft", tmp_path)
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {ARGUMENTS, COUNTERS.format(0), "optimizer.pt", "adapter_model.safetensors"} < names
    assert "trainer_state.json" not in names
