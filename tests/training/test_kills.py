"""Every stage and the pipeline, killed at random moments and resumed, end as the unbroken run.

`RLHF_RECIPES_KILLS=20 pytest tests/training/test_kills.py` kills each twenty times, in about five minutes; the default is once.
`RLHF_RECIPES_KILLS_SEED=1` draws other moments.
"""

import json
import os
import re
import subprocess
import sys

from rlhf_recipes.stages import pipeline_stages
from support import ROOT
from support.small_stages import small, without_times

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.kill
KILLS = int(os.environ.get("RLHF_RECIPES_KILLS", "1"))
SEED = os.environ.get("RLHF_RECIPES_KILLS_SEED", "0")
STAGES = (*pipeline_stages(), "merge", "pipeline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the results of all stages: unbroken in `whole`, resumed in `killed-1`, ..."""
    folder = tmp_path_factory.mktemp("kills")
    stages = {}
    files = small(folder)
    for name, values in files.items():
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(values))
        resume = ["--resume_from_checkpoint", "true"] if "max_steps" in values else []
        stages[name] = [name, "--config", str(config), "--output_dir", "OUT", *resume]
    entries = [
        {"name": "sft", "config": str(folder / "sft.yaml")},
        {"name": "sample", "config": str(folder / "sample.yaml"), "arguments": {"policies": {"sft": "{sft}"}}},
        {"name": "rank", "config": str(folder / "rank.yaml"), "arguments": {"groups": "{sample}"}},
        {
            "name": "evaluate",
            "config": str(folder / "evaluate.yaml"),
            "arguments": {"policies": {"base": None, "sft": "{sft}"}},
        },
    ]
    for place in ("whole", "full", *(f"killed-{number}" for number in range(1, KILLS + 1))):  # each names its folder
        (folder / place).mkdir()
        output = str(folder / place / "pipeline")
        (folder / place / "pipeline.yaml").write_text(yaml.safe_dump({"output_dir": output, "stages": entries}))
    stages["pipeline"] = ["pipeline", "--config", "OUT.yaml"]
    (folder / "stages.json").write_text(json.dumps(stages))
    command = [sys.executable, str(ROOT / "tests/support/kills.py"), str(folder), str(folder / "stages.json")]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "datasets")}
    result = subprocess.run([*command, str(KILLS), SEED], env=environment, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, (result.stdout + result.stderr)[-10000:]
    return folder


def content(path, folder):
    """Return the content of a file without times and folders."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.name == "training_args.bin":  # has the folder
        return None
    text = re.sub(rf"{folder.parent}/(whole|full|killed-\d+)", "FOLDER", path.read_text(encoding="utf-8"))
    if path.name == "sample.json":
        return {key: value for key, value in json.loads(text).items() if key != "files"}
    if path.suffix in (".json", ".jsonl"):
        return [without_times(json.loads(line)) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    return re.sub(r", \d+ steps in \d+ s", "", text)  # of the model card


def results(folder):
    """Return the files of a result by name, without checkpoints and the state of a pipeline."""
    paths = [
        path for path in folder.rglob("*") if path.is_file() and not re.search("checkpoint-|pipeline.json|/configs/", str(path))
    ]
    return {str(path.relative_to(folder)): content(path, folder.parent) for path in paths}


def same(one, other, where):
    """Check that two results are equal, weights to the bit."""
    assert one.keys() == other.keys(), where
    for name, value in one.items():
        if name.endswith(".safetensors"):
            assert value.keys() == other[name].keys()
            assert all(torch.equal(value[key], other[name][key]) for key in value), f"{where}: {name}"
        else:
            assert other[name] == value, f"{where}: {name}"


@pytest.mark.parametrize("stage", STAGES)
def test_killed_stage_ends_as_unbroken_one(folder, stage):
    whole = results(folder / "whole" / stage)
    assert whole
    broken = [path for path in sorted(folder.glob("killed-*")) if (path / stage).exists()]
    assert broken
    for place in broken:
        same(whole, results(place / stage), place.name)


@pytest.mark.parametrize("disk", ["full", "read-only"])
@pytest.mark.parametrize("stage", STAGES)
def test_unwritable_disk_is_one_message_and_keeps_results(folder, stage, disk):
    assert json.loads((folder / f"{stage}.codes.json").read_text())[disk] == 2
    log = (folder / disk / f"{stage}.log").read_text()
    assert "Traceback" not in log
    (message,) = [line for line in log.splitlines() if line.startswith("error: ")]
    reason = "Read-only file system" if disk == "read-only" else "(No space left on device|File too large|is the disk full)"
    assert re.search(rf"output_dir: {folder}/[\w./-]+: cannot be written( to)? \({reason}", message)
    assert re.search("Fix: |nothing is left of it", message)
    if disk == "full" and (folder / disk / stage / "recipe.json").exists():
        whole, left = results(folder / "whole" / stage), results(folder / disk / stage)
        if stage == "ppo":  # started over; `recipe.json` has the log of the result
            del whole["log.jsonl"], left["log.jsonl"]
        same(whole, left, disk)
    elif disk == "read-only":
        assert not (folder / disk / stage).exists()
