"""Warnings: a line of their own, once each, and all again at the end of a run."""

import logging
import subprocess
import sys

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.config.current import CURRENT_RUN, CurrentRun
from rlhf_recipes.config.origins import origin_of
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.warning_log import relay_warnings, repeat_warnings, warnings_so_far

import pytest
from tqdm import tqdm

logger = logging.getLogger("rlhf_recipes.of.a.test")
AGAIN = ["Warnings of this run, again:", "warning: first", "warning: second"]


def warn():
    for text in ("first", "second", "first"):
        logger.warning("%s", text)


def fail(before):
    @exit_on_recipe_error()
    def recipe():
        before()
        raise RecipeError("seed: wrong")

    with pytest.raises(SystemExit):
        recipe()


def test_each_text_once_and_all_again_at_the_end(capsys):
    with exit_on_recipe_error():
        warn()
        logger.info("no warning")
        assert warnings_so_far() == ["first", "second"]
        sys.stderr.write("the result\n")
    assert capsys.readouterr().err.splitlines() == [*AGAIN[1:], "the result", *AGAIN]
    assert not warnings_so_far()


def test_before_the_error_that_ends_the_run(capsys):
    fail(warn)
    assert capsys.readouterr().err.splitlines() == [*AGAIN[1:], *AGAIN, "error: seed: wrong"]


def test_nothing_is_added_to_a_run_without_warnings(capsys):
    with exit_on_recipe_error():
        pass
    assert capsys.readouterr().err == ""


def test_below_a_progress_bar(capsys):
    with exit_on_recipe_error(), tqdm(range(3), desc="training") as bar:
        bar.update()
        logger.warning("of step\n1 with \x1b[31mcolour")
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("warning: of step 1 with \\x1b[31mcolour") == 2


def test_an_error_stands_below_the_bar_of_a_training(capsys):
    bars = []  # a trainer keeps its bar open when it fails
    fail(lambda: bars.append(tqdm(range(3), desc="training")))
    bars[0].close()
    assert "error: seed: wrong" in capsys.readouterr().err.splitlines()


def test_the_place_where_an_argument_was_written(tmp_path, capsys):
    config = tmp_path / "my.yaml"
    config.write_text("seed: 1\nwarmup_steps: 50\n")
    origin = origin_of(config, ["seed", "warmup_steps", "max_steps"], ["max_steps"])
    with exit_on_recipe_error():
        CURRENT_RUN.set(CurrentRun(tmp_path / "sft.py", config, origin, {}))
        for text in ("warmup_steps: 50: long", "max_steps: 2: few", "train: few rows"):
            logger.warning("%s", text)
    places = [f"{config}: line 2: warmup_steps: 50: long", "the command line: max_steps: 2: few", "train: few rows"]
    assert capsys.readouterr().err.splitlines()[:3] == [f"warning: {place}" for place in places]


def test_only_the_main_process_warns(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with repeat_warnings():
        warn()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_launcher_repeats_the_warnings_of_its_recipes(capfd, on_terminal):
    script = "import logging\nfrom rlhf_recipes.cli import exit_on_recipe_error\nwith exit_on_recipe_error():\n"
    script += "    logging.getLogger('rlhf_recipes').warning('few rows')\n    raise ValueError"
    with repeat_warnings(), relay_warnings("sft", on_terminal) as environment:
        assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 1
    printed = [line for line in capfd.readouterr().err.splitlines() if "arning" in line]
    assert printed == ["warning: few rows", *["warning: sft: few rows"] * (not on_terminal), AGAIN[0], "warning: sft: few rows"]
