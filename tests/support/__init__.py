"""What tests share: where things are, and how a recipe is run; importing it sets the environment of all of them."""

import os
import runpy
import sys
from pathlib import Path

# Set before torch or the Hub's client is imported, and inherited by the recipes that tests launch.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # two threads on two busy cores spin
    "OMP_WAIT_POLICY": "passive",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
}

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"


def run_recipe(recipe: str, *options: object) -> None:
    """Runs a recipe in this process: a process of its own takes eight seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{recipe}.py", *map(str, options)])
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
