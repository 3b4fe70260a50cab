"""Fixtures, order and summary of the whole test suite."""

import gc
import os
from collections import Counter
from pathlib import Path

from support import SHARED, has_gpu, run_recipe  # first, since it sets the environment

import pytest

# Files whose few tests take long run first, so that no worker is left alone with them at the end.
LONG = (
    "test_real_pipeline.py",
    "test_smollm2.py",
    "test_tiny_stages.py",
    "test_distributed.py",
    "test_real_rewards.py",
    "test_real.py",
)
LONG += ("test_documents.py", "test_pipeline.py", "test_real_input.py", "test_kills.py", "test_smoke.py")
LEFT_OUT = ("browser", "fuzz", "kill", "real", "slow", "smollm2")
"""Markers of tests that `make test` leaves out."""

deselected: Counter[str] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files in `LONG` first, and skip tests of GPUs without one."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count tests that `-m` leaves out, by marker."""
    for item in items:
        deselected.update(name for name in LEFT_OUT if item.get_closest_marker(name))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that were left out, and the command that runs them."""
    if deselected and terminalreporter.config.option.markexpr:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(deselected.items()))
        terminalreporter.write_line(f"left out by marker: {counts}; `.ci/run` runs them all")


def pytest_collection_finish() -> None:
    """Exempt imported modules from garbage collection, which recipes trigger often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _datasets_cache(tmp_path_factory):
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data, which users do not have."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared: real models and data")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, which `.ci/run` fetches."""
    folder = Path(os.environ.get("SMOLLM2", ""))
    if not (folder / "config.json").is_file():
        pytest.skip("set SMOLLM2 to a folder with SmolLM2-135M-Instruct: `python tests/support/smollm2.py FOLDER` makes one")
    return folder


@pytest.fixture
def launch(capsys):
    """Run a recipe in this process: `launch("sft", "--seed", 1)` returns its exit status and its stderr."""

    def run(recipe: str, *options: object) -> tuple[int, str]:
        capsys.readouterr()
        try:
            run_recipe(recipe, *options)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run
