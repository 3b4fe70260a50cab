"""Stages that others need."""

from types import SimpleNamespace

import rlhf_recipes.training.run
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import RECIPE
from rlhf_recipes.training.run import run_dependencies

import pytest


@pytest.fixture
def stage(tmp_path):
    """A recipe that leaves a result, and fails when it is told to; with the YAML file of it."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "sft.py").write_text(
        "import pathlib, sys, yaml\n"
        "config = yaml.safe_load(open(sys.argv[2]))\n"
        "assert not config.get('broken')\n"
        "pathlib.Path(config['output_dir']).mkdir()\n"
        f"pathlib.Path(config['output_dir'], '{RECIPE}').write_text('{{}}')\n"
    )
    config = tmp_path / "sft.yaml"
    config.write_text(f"output_dir: {tmp_path / 'result'}\n")
    return config


def test_a_stage_that_is_read_and_has_no_result_is_run_once(stage, tmp_path, capfd):
    result = tmp_path / "result" / RECIPE
    for _ in range(2):
        run_dependencies([str(stage)], tmp_path / "recipes", inputs=[tmp_path / "result"])
        assert result.exists()
    assert capfd.readouterr().out.count("no result yet: running") == 1


def test_a_stage_whose_result_nobody_reads_is_not_run(stage, tmp_path):
    run_dependencies([str(stage)], tmp_path / "recipes", inputs=[tmp_path / "mine"])
    assert not (tmp_path / "result").exists()


def test_several_processes_do_not_wait_for_a_stage(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf_recipes.training.run, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(
        RecipeError, match=r"needs: .*result has no result yet, .* first run `accelerate launch .*sft.py --config"
    ):
        run_dependencies([str(stage)], tmp_path / "recipes", inputs=[str(tmp_path / "result")])
    assert not (tmp_path / "result").exists()


def test_a_stage_that_fails_is_named(stage, tmp_path):
    stage.write_text(stage.read_text() + "broken: true\n")
    with pytest.raises(RecipeError, match=r"needs: .*sft\.yaml: this stage failed"):
        run_dependencies([str(stage)], tmp_path / "recipes", inputs=[str(tmp_path / "result")])
