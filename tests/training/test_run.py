"""Stages that are run because others need them."""

from types import SimpleNamespace

import rlhf_recipes.training.run
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import RECIPE
from rlhf_recipes.training.run import run_dependencies

import pytest


@pytest.fixture
def stage(tmp_path):
    """Return the YAML file of a recipe that writes a result, and fails with `broken: true`."""
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


def test_needed_stage_without_result_is_run_once(stage, tmp_path, capfd):
    result = tmp_path / "result" / RECIPE
    for _ in range(2):
        run_dependencies([str(stage)], tmp_path / "recipes", inputs=[tmp_path / "result"])
        assert result.exists()
    assert capfd.readouterr().out.count("no result yet: running") == 1


def test_stage_that_is_not_read_is_not_run(stage, tmp_path):
    run_dependencies([str(stage)], tmp_path / "recipes", inputs=[tmp_path / "mine"])
    assert not (tmp_path / "result").exists()


def test_several_processes_refuse_to_wait_for_a_stage(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf_recipes.training.run, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(RecipeError, match=r"needs: .*result.* `accelerate launch .*sft.py --config"):
        run_dependencies([str(stage)], tmp_path / "recipes", inputs=[str(tmp_path / "result")])
    assert not (tmp_path / "result").exists()


def test_failed_stage_is_named(stage, tmp_path):
    stage.write_text(stage.read_text() + "broken: true\n")
    with pytest.raises(RecipeError, match=r"needs: .*sft\.yaml"):
        run_dependencies([str(stage)], tmp_path / "recipes", inputs=[str(tmp_path / "result")])
