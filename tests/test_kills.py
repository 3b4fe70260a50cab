"""Every stage, and the pipeline, killed at random moments and gone on with: the result is that of the unbroken run.

`RLHF_RECIPES_KILLS=20 pytest tests/test_kills.py` kills each twenty times, in some five minutes on one core; by default it is
once, at the same moment as far as the machine is as fast. `RLHF_RECIPES_KILLS_SEED=1` draws other moments.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from rlhf_recipes.tiny import splits

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file

KILLS = int(os.environ.get("RLHF_RECIPES_KILLS", "1"))
SEED = os.environ.get("RLHF_RECIPES_KILLS_SEED", "0")
TIMES = re.compile("runtime|per_second|step_time|wall_time|tokens_per_s|^peak_memory$|^run$|^resume_from_checkpoint$")
CHECKPOINTS = {"save_steps": 1, "save_total_limit": 2, "eval_steps": 2, "logging_steps": 2, "warmup_steps": 0}
STAGES = ("sft", "reward", "dpo", "ppo", "sample", "rank", "evaluate", "merge", "pipeline")


def rows(folder, name, found):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def settings(recipe, **values):
    found = yaml.safe_load((ROOT / "configs" / "tiny" / f"{recipe}.yaml").read_text())
    for key in ("needs", "dataset_arguments", "output_dir"):
        found.pop(key, None)
    return found | values


def small(folder):
    """The YAML files' content of each stage, little enough for a second or two."""
    policies = {"sft": str(folder / "whole" / "sft")}
    texts = rows(folder, "sft", splits.demonstrations(rows=24))
    rankings = rows(folder, "rankings", splits.rankings(rows=16, k=3))
    prompts = rows(folder, "prompts", splits.prompts(rows=24))
    evaluation = rows(folder, "evaluation", splits.evaluation(rows=8))

    held_out = {
        "reward": rows(folder, "held_out", splits.rankings("test", rows=8, k=3)),
        "ppo": rows(folder, "asked", splits.prompts("test", rows=8)),
    }

    def training(recipe, data, size, steps, **values):
        common = {"dataset_name": data, "eval_datasets": [{"path": held_out.get(recipe, data)}], "max_steps": steps}
        common |= {"per_device_train_batch_size": size, "per_device_eval_batch_size": 8, "disable_tqdm": True}
        return settings(recipe, **common, **CHECKPOINTS, **values)

    asked = {"dataset_name": prompts, "max_completion_length": 6, "batch_size": 16}
    return {
        "sft": training("sft", texts, 4, 5, lora_dropout=0.1),
        "reward": training("reward", rankings, 4, 3, ensemble_size=2),
        "dpo": training("dpo", rankings, 4, 3, start_from=policies["sft"]),
        "ppo": training("ppo", prompts, 8, 4, start_from=policies["sft"], value_warmup_steps=1, max_completion_length=6),
        "sample": settings("sample", **asked, policies=policies, num_completions=4, temperature=2.0),
        "rank": settings("rank", groups=str(folder / "whole" / "sample")),
        "evaluate": settings(
            "evaluate",
            dataset_name=evaluation,
            policies={"base": None, **policies},
            rewards=[{"path": "rlhf_recipes.rewards.Abstention"}],
            frontier=[],
            ptx_dataset=[],
            num_answers=1,
            batch_size=32,
        ),
        "merge": settings("merge", adapter=policies["sft"]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of all stages: unbroken ones in `whole`, of others in `killed-1`, ..."""
    folder = tmp_path_factory.mktemp("kills")
    stages = {}
    files = small(folder)
    for name, values in files.items():
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(values))
        goes_on = ["--resume_from_checkpoint", "true"] if "max_steps" in values else []
        stages[name] = [name, "--config", str(config), "--output_dir", "OUT", *goes_on]
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
    for place in ("whole", "full", *(f"killed-{number}" for number in range(1, KILLS + 1))):  # its folder stands in the file
        (folder / place).mkdir()
        output = str(folder / place / "pipeline")
        (folder / place / "pipeline.yaml").write_text(yaml.safe_dump({"output_dir": output, "stages": entries}))
    stages["pipeline"] = ["pipeline", "--config", "OUT.yaml"]
    (folder / "stages.json").write_text(json.dumps(stages))
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(folder), str(folder / "stages.json")]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "datasets")}
    result = subprocess.run([*command, str(KILLS), SEED], env=environment, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, (result.stdout + result.stderr)[-10000:]
    return folder


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not TIMES.search(key)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def content(path, folder):
    """What a file says, without times and folders."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.name == "training_args.bin":  # of a dataclass, and in it the folder
        return None
    text = re.sub(rf"{folder.parent}/(whole|full|killed-\d+)", "FOLDER", path.read_text(encoding="utf-8"))
    if path.name == "sample.json":
        return {key: value for key, value in json.loads(text).items() if key != "files"}
    if path.suffix in (".json", ".jsonl"):
        return [without_times(json.loads(line)) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    return re.sub(r", \d+ steps in \d+ s", "", text)  # of the model card


def results(folder):
    """The files of a result, by name, that are neither in checkpoints nor what a pipeline remembers."""
    paths = [
        path for path in folder.rglob("*") if path.is_file() and not re.search("checkpoint-|pipeline.json|/configs/", str(path))
    ]
    return {str(path.relative_to(folder)): content(path, folder.parent) for path in paths}


def same(one, other, where):
    """That two results are equal, weights by every bit."""
    assert one.keys() == other.keys(), where
    for name, value in one.items():
        if name.endswith(".safetensors"):
            assert value.keys() == other[name].keys()
            assert all(torch.equal(value[key], other[name][key]) for key in value), f"{where}: {name}"
        else:
            assert other[name] == value, f"{where}: {name}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_killed_again_and_again_ends_as_the_unbroken_one(folder, stage):
    whole = results(folder / "whole" / stage)
    assert whole
    broken = [path for path in sorted(folder.glob("killed-*")) if (path / stage).exists()]
    assert broken
    for place in broken:
        same(whole, results(place / stage), place.name)


@pytest.mark.parametrize("disk", ["full", "read-only"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_cannot_be_written_to_is_one_message_and_what_was_there_is_whole(folder, stage, disk):
    assert json.loads((folder / f"{stage}.codes.json").read_text())[disk] == 2
    said = (folder / disk / f"{stage}.log").read_text()
    assert "Traceback" not in said
    (message,) = [line for line in said.splitlines() if line.startswith("error: ")]
    reason = "Read-only file system" if disk == "read-only" else "(No space left on device|File too large|is the disk full)"
    assert re.search(rf"output_dir: {folder}/[\w./-]+: cannot be written( to)? \({reason}", message)
    assert re.search("name another|make room|nothing is left of it", message)
    if disk == "full" and (folder / disk / stage / "recipe.json").exists():
        whole, left = results(folder / "whole" / stage), results(folder / disk / stage)
        if stage == "ppo":  # began anew, and so did this: `recipe.json` has the log of the result
            del whole["log.jsonl"], left["log.jsonl"]
        same(whole, left, disk)
    elif disk == "read-only":
        assert not (folder / disk / stage).exists()
