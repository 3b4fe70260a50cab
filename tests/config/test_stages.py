"""The registry of stages: complete for those we have, and enough to add one as docs/contributing.md shows."""

import json
import re
import runpy
import subprocess
import sys
import textwrap
from types import SimpleNamespace

from rlhf_recipes import stages
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.evaluation.report.html import _curves
from rlhf_recipes.pipeline.checks import check_arguments
from rlhf_recipes.pipeline.running import read_pipeline
from rlhf_recipes.stages import STAGES, find_stage, parse_arguments, parse_values
from support import ROOT

import pytest
import yaml


@pytest.mark.parametrize("recipe", STAGES)
def test_entries_name_what_exists(recipe):
    stage = STAGES[recipe]
    assert all(isinstance(cls, type) for cls in stage.argument_classes())
    assert stage.planner is None or callable(stage.memory_planner())
    assert not stage.trains or stage.result


def test_an_unknown_stage_is_one_message():
    with pytest.raises(RecipeError, match=r"'sftt' .* did you mean 'sft'"):
        find_stage("sftt")


def test_values_are_parsed_without_a_file(tmp_path):
    data_args, training_args, _ = parse_values("sft", {"dataset_name": "a.jsonl", "output_dir": str(tmp_path)})
    assert (data_args.dataset_name, training_args.output_dir) == ("a.jsonl", str(tmp_path))
    with pytest.raises(RecipeError, match=r"^unknown key 'sed'"):
        parse_values("sft", {"sed": 1})


# --- Another stage ---------------------------------------------------------------------------------------


@pytest.fixture
def kto(tmp_path, monkeypatch):
    """A checkout with the stage that docs/contributing.md adds; stages of a pipeline run in this process."""
    section = (ROOT / "docs" / "contributing.md").read_text().split("\n## A stage\n")[1].split("\n## ")[0]
    entry, recipe, config = (textwrap.dedent(block) for block in re.findall(r"```\w+\n(.*?)```", section, re.DOTALL))
    monkeypatch.setitem(STAGES, "kto", eval(f"dict({{{entry}}})", dict(vars(stages)))["kto"])
    for path, text in (("recipes/kto.py", recipe), ("configs/tiny/kto.yaml", config)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    entry = {"name": "kto", "config": "configs/tiny/kto.yaml", "arguments": {"start_from": None}}  # without SFT first
    pipeline = {"output_dir": "runs", "stages": [entry]}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    monkeypatch.chdir(tmp_path)

    def run(command, **_):
        launched.append(command)
        monkeypatch.setattr(sys, "argv", command[1:])
        runpy.run_path(command[1], run_name="__main__")
        return subprocess.CompletedProcess(command, 0)

    launched = []
    monkeypatch.setattr(subprocess, "run", run)
    return tmp_path, launched


def test_a_stage_costs_a_recipe_an_entry_and_a_yaml_file(kto, capsys):
    folder, launched = kto
    *_, training_args, _ = parse_arguments(folder / "recipes" / "kto.py", argv=["--beta", "0.3"])
    assert (type(training_args).__name__, training_args.beta) == ("KTOConfig", 0.3)

    def run():
        pipeline = read_pipeline(folder / "pipeline.yaml", folder / "recipes")
        check_arguments(pipeline)
        pipeline.run()
        return pipeline

    pipeline = run()
    assert [command[1] for command in launched] == [str(folder / "recipes" / "kto.py")]
    record = json.loads((folder / "runs" / "kto" / "recipe.json").read_text())
    assert (record["recipe"], record["run"]["steps"]) == ("kto", 4)
    result = SimpleNamespace(policies={"kto": SimpleNamespace(adapter="runs/kto")}, rewards={})
    assert len(_curves(result)["kto"]) == len(STAGES["kto"].curves), "the report plots each of its curves"
    card = (folder / "runs" / "kto" / "README.md").read_text()
    assert "A policy" in card
    assert "https://arxiv.org/abs/2402.01306" in card
    assert "`beta: 0.1`" in card

    assert pipeline.status(pipeline.stages[0]) == "done"
    run()
    assert len(launched) == 1
    assert "skipped" in capsys.readouterr().out


def test_its_mistakes_are_messages_too(kto):
    folder, _ = kto
    with pytest.raises(RecipeError, match="unknown option '--bta'; did you mean 'beta'"):
        parse_arguments(folder / "recipes" / "kto.py", argv=["--bta", "0.3"])
