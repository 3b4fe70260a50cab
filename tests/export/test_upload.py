"""Stages upload once, when they are finished, without paths of this machine."""

import json
from pathlib import Path

from support import NO_EVALUATION

import pytest
from huggingface_hub import HfApi, RepoUrl

SMALL = ("--max_steps", 2, "--save_steps", 1, "--per_device_train_batch_size", 4, *NO_EVALUATION)
DATA = {"sft": '{"rows": 16}', "reward": '{"rows": 16, "k": 4}'}
PUSH = ("--push_to_hub", "true", "--hub_model_id", "me/mine")


@pytest.fixture
def uploads(monkeypatch):
    """Uploaded folders in place of the Hub: file -> content."""
    folders = []

    def upload_folder(self, folder_path, **options):
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        folders.append({path.relative_to(folder_path).as_posix(): path.read_bytes() for path in files})

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: RepoUrl(f"https://huggingface.co/{name}"))
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, name, **_: ["adapter_config.json"])
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return folders


def test_finished_result_is_uploaded_once(launch, uploads, tmp_path):
    """The repository holds an earlier result of the same kind."""
    output = tmp_path / "mine"
    status, error = launch("sft", *SMALL, "--dataset_arguments", DATA["sft"], "--output_dir", output, *PUSH)
    assert status == 0, error
    (files,) = uploads
    here = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    left_out = {name for name in here - files.keys() if not name.startswith("checkpoint-")}
    assert files.keys() <= here
    assert left_out == {"training_args.bin"}
    record = json.loads(files["recipe.json"])
    assert str(tmp_path) in (output / "recipe.json").read_text()
    assert str(tmp_path) not in files["recipe.json"].decode()
    assert record["recipe"] == "sft"
    assert record["arguments"]["SFTConfig"]["push_to_hub"] is True
    card = (output / "README.md").read_text()
    assert '"me/mine"' in card
    assert "A policy: an adapter on base" in card
    assert "None" not in card


def test_members_of_an_ensemble_are_uploaded(launch, uploads, tmp_path, monkeypatch):
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, name, **_: [".gitattributes"])
    rankings = ("--dataset_name", "rlhf_recipes.tiny.splits.rankings", "--test_split_size", "none")
    data = (*rankings, "--dataset_arguments", DATA["reward"])
    run = (*SMALL, "--ensemble_size", 2, *data, "--output_dir", tmp_path / "mine")
    status, error = launch("reward", *run, *PUSH)
    assert status == 0, error
    (files,) = uploads
    members = {f"member-{number}/{name}" for number in (0, 1) for name in ("adapter_model.safetensors", "recipe.json")}
    assert members | {"reward.json", "recipe.json"} <= files.keys()
    assert not any("checkpoint-" in name or name.endswith(".bin") for name in files)
    assert all(str(tmp_path) not in files[name].decode() for name in files if name.endswith("recipe.json"))


def test_unreachable_hub_keeps_the_result(launch, tmp_path):
    run = (*SMALL, "--dataset_arguments", DATA["sft"], "--output_dir", tmp_path / "mine", "--push_to_hub", "true")
    status, error = launch("sft", *run)
    assert status == 2
    assert "push_to_hub: mine: " in error
    assert f"run `hf upload mine {tmp_path / 'mine'} --exclude 'checkpoint-*'`" in error
    assert json.loads((tmp_path / "mine" / "recipe.json").read_text())["run"]["steps"] == 2


def test_uploading_checkpoints_is_refused(launch, tmp_path):
    status, error = launch("sft", *SMALL, *PUSH, "--hub_strategy", "all_checkpoints", "--output_dir", tmp_path)
    assert status == 2
    assert "command line: hub_strategy: all_checkpoints" in error
