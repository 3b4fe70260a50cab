"""A pipeline of three small stages in a folder of its own, whose launches are recorded in place of running them."""

import json
import subprocess
import threading
from pathlib import Path

from rlhf_recipes.pipeline.running import read_pipeline
from rlhf_recipes.pipeline.settings import read_settings
from support import ROOT

import pytest
import yaml

LAUNCHER = "compute_environment: LOCAL_MACHINE\nuse_cpu: true\nnum_processes: 1\ndistributed_type: 'NO'\n"


class Project:
    """A pipeline in the current folder: `sft` reads a file, `dpo` the result of `sft`, and `other` neither."""

    path = Path("pipeline.yaml")

    def __init__(self):
        Path("data.jsonl").write_text('{"text": "one"}\n')
        Path("sft.yaml").write_text(
            "dataset_name: data.jsonl\nlearning_rate: 1.0e-3\noutput_dir: elsewhere\nneeds: [first.yaml]\n"
        )
        Path("dpo.yaml").write_text("beta: 0.1\n")
        Path("launcher.yaml").write_text(LAUNCHER)
        self.values = {
            "output_dir": "runs",
            "accelerate_config": "launcher.yaml",
            "stages": [
                {"name": "sft", "config": "sft.yaml"},
                {"name": "other", "recipe": "sft", "config": "sft.yaml", "arguments": {"dataset_name": "me/rows"}},
                {"name": "dpo", "config": "dpo.yaml", "arguments": {"start_from": "{sft}", "beta": 0.3}},
            ],
        }
        self.write()

    def write(self, **changes):
        """Write pipeline.yaml with keys changed."""
        self.values |= changes
        self.path.write_text(yaml.safe_dump(self.values, sort_keys=False))

    def change(self, stage, **arguments):
        """Write pipeline.yaml with arguments of a stage changed."""
        (entry,) = (entry for entry in self.values["stages"] if entry["name"] == stage)
        entry.setdefault("arguments", {}).update(arguments)
        self.write()

    def read(self, names=None, recipes=ROOT / "recipes", settings=()):
        return read_pipeline(self.path, recipes, names, read_settings(settings))

    def run(self, names=None):
        self.read(names).run()

    def statuses(self):
        pipeline = self.read()
        return [pipeline.status(stage) for stage in pipeline.stages]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Project()


@pytest.fixture
def launched(monkeypatch):
    """Record what is launched: the name of each stage, and whether it is to resume.

    Names in `failing` fail; those in `together` wait for one another.
    """
    calls = []

    def run(command, pass_fds, stdout=None, stderr=None, env=None):
        config = Path(command[command.index("--config") + 1])
        folder = Path(yaml.safe_load(config.read_text())["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        calls.append((config.stem, "--resume_from_checkpoint" in command))
        run.environments[config.stem] = env
        if stdout:
            stdout.write(f"output of {config.stem}\n")
        if config.stem not in run.failing:
            for name in ("recipe.json", "metrics.json"):
                (folder / name).write_text(json.dumps({"calls": len(calls)}))
        if config.stem in run.together:
            run.barrier.wait()
        return subprocess.CompletedProcess(command, returncode=config.stem in run.failing)

    run.failing, run.calls, run.environments = set(), calls, {}
    run.together, run.barrier = set(), threading.Barrier(2, timeout=20)
    monkeypatch.setattr(subprocess, "run", run)
    return run
