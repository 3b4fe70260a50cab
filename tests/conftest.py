"""Settings of the whole test suite: offline, quiet, and one thread a process."""

import gc
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

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


# Those that take minutes, each in a few tests: begun first, they are not what one process does last and alone
LONG = ("test_real_pipeline.py", "test_tiny_stages.py", "test_distributed.py", "test_real_rewards.py", "test_real_ppo.py")
LONG += ("test_documents.py", "test_pipeline.py", "test_real_input.py", "test_kills.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """What is imported stays: collections of garbage, of which each run of a recipe makes several, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _datasets_cache(tmp_path_factory):
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data, which a developer has and a user has not."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared: real models and data")
    return SHARED


def run_recipe(recipe: str, *options: object) -> None:
    """Runs a recipe in this process: a process of its own takes eight seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{recipe}.py", *map(str, options)])
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")


@pytest.fixture
def launch(capsys):
    """Runs a recipe in this process: `launch("sft", "--seed", 1)`; returns its exit status and what it printed on stderr."""

    def run(recipe: str, *options: object) -> tuple[int, str]:
        capsys.readouterr()
        try:
            run_recipe(recipe, *options)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run
