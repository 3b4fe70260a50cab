"""What a resumed run logs: the tokens, the averages of a line begun before it was broken off, and the loss of all steps."""

import json
import shutil

from rlhf_recipes.stages import training_stages
from rlhf_recipes.training.mixin import COUNTERS
from rlhf_recipes.training.record import RunRecorder
from rlhf_recipes.training.resume import ARGUMENTS
from support.small_stages import small, without_times

import pytest
import yaml
from transformers import TrainerState


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """YAML files of small stages: a line of the log every two steps, a checkpoint at each."""
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


def told(output):
    """The log as it stands in the record and in its own file, and the metrics; without times."""
    record = json.loads((output / "recipe.json").read_text())
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return without_times({"log": record["log"], "metrics": record["metrics"], "lines": lines})


@pytest.mark.parametrize("recipe", training_stages())
def test_a_resumed_run_logs_what_the_unbroken_one_does(launch, folder, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(RunRecorder, "on_train_end", lambda meter, *_, **__: setattr(meter, "wall_time", 10.0))
    whole = tmp_path / "whole"
    run(launch, folder, recipe, whole)
    expected = told(whole)
    last = expected["log"][-1]["step"]
    assert "train_loss" in expected["metrics"]
    assert expected["metrics"]["num_tokens"] > 0
    for step in (1, last):  # within a line of the log; where nothing is left to train
        broken = tmp_path / f"broken-{step}"
        shutil.copytree(whole / f"checkpoint-{step}", broken / f"checkpoint-{step}")
        run(launch, folder, recipe, broken, "--resume_from_checkpoint", "true")
        assert told(broken) == expected, f"resumed at step {step}"
        rate = json.loads((broken / "recipe.json").read_text())["run"]
        assert rate["steps"] == last - step
        if rate["steps"]:
            assert 0 < 10 * rate["tokens_per_s"] < expected["metrics"]["num_tokens"], "of the steps of this process alone"


def test_counts_that_nobody_left_are_begun_anew_and_spoilt_ones_are_one_message(launch, folder, tmp_path):
    whole = tmp_path / "whole"
    run(launch, folder, "sft", whole)
    counts = whole / "checkpoint-1" / COUNTERS.format(0)
    for content in ("{", "[]", '{"loss": 1}', json.dumps(json.loads(counts.read_text()) | {"metrics": []})):
        counts.write_text(content)
        options = ("--output_dir", tmp_path / "spoilt", "--resume_from_checkpoint", whole / "checkpoint-1")
        status, error = launch("sft", "--config", folder / "sft.yaml", *options)
        assert status == 2
        assert f"checkpoint-1/{counts.name}" in error
        assert "Traceback" not in error
    counts.unlink()
    run(launch, folder, "sft", tmp_path / "without", "--resume_from_checkpoint", whole / "checkpoint-1")


def test_a_checkpoint_is_not_whole_before_its_arguments_and_counts_are_there(launch, folder, tmp_path, monkeypatch):
    """Killed in between, it would be gone on from with any arguments."""

    class Killed(BaseException):
        """What no recipe catches."""

    def killed(*_):
        raise Killed

    monkeypatch.setattr(TrainerState, "save_to_json", killed)
    with pytest.raises(Killed):
        run(launch, folder, "sft", tmp_path)
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {ARGUMENTS, COUNTERS.format(0), "optimizer.pt", "adapter_model.safetensors"} < names
    assert "trainer_state.json" not in names
