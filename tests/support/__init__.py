"""Paths, the environment of all tests, and how a recipe is run; import this before PyTorch."""

import os
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

USER_ENVIRONMENT = dict(os.environ)
"""The environment before the settings below; tests marked `gpu` run recipes in it."""

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
NO_EVALUATION = ("--eval_strategy", "no", "--eval_datasets", "[]")
"""Options of a training whose evaluation would only take time."""

# Set before torch or the Hub's client is imported. Recipes that tests launch inherit it.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # two threads on two busy cores spin
    "OMP_WAIT_POLICY": "passive",
    "CUDA_VISIBLE_DEVICES": "",  # results on a CPU are the same everywhere
    "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")])),  # of scripts in here
}

import pytest  # noqa: E402


def run_recipe(recipe: str, *options: object) -> None:
    """Run a recipe in this process; a new process spends eight seconds on imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{recipe}.py", *map(str, options)])
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")


@cache
def has_gpu() -> bool:
    """Whether PyTorch finds a CUDA device, asked of a process that may see it."""
    if shutil.which("nvidia-smi") is None:
        return False
    command = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(command, env=USER_ENVIRONMENT).returncode == 0
