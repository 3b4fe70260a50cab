"""Fixtures and order of the whole test suite."""

import gc
from pathlib import Path

from support import SHARED, run_recipe  # first: it sets the environment

import pytest

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
