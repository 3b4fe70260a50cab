"""`~` and `$NAME` in a pipeline: stages, seeds, rounds, needs and plans mean one folder, and none is called `~`."""

from pathlib import Path

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.pipeline.estimates import plannable_stages
from support import ROOT

import pytest
import yaml


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "disk"))
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "me").mkdir()
    return tmp_path


def entry(name, recipe="sft", **arguments):
    return {"name": name, "recipe": recipe, "config": f"{recipe}.yaml", "arguments": arguments}


@pytest.mark.parametrize("written", ["~/runs", "$HOME/runs", "${SCRATCH}/../me/runs"])
def test_stages_run_where_the_pipeline_looks_for_them(project, launched, home, written):
    project.write(output_dir=written, seeds=[3])
    project.run()
    assert [name for name, _ in launched.calls] == ["sft-3", "other-3", "dpo-3"]
    assert project.statuses() == ["done"] * 3
    runs = Path(written.replace("~", "$HOME").replace("$HOME", str(home / "me")).replace("${SCRATCH}", str(home / "disk")))
    assert {path.name for path in runs.iterdir()} == {"seed-3", "configs", "pipeline.json", "pipeline.lock"}
    dpo = yaml.safe_load((runs / "configs" / "dpo-3.yaml").read_text())
    assert (dpo["output_dir"], dpo["start_from"]) == (f"{runs}/seed-3/dpo", f"{runs}/seed-3/sft")
    assert not [path for path in home.rglob("*") if "~" in path.name or "$" in path.name]


def test_paths_in_arguments_and_named_files(project, home):
    for name in ("sft", "dpo"):
        (home / "me" / f"{name}.yaml").write_text(Path(f"{name}.yaml").read_text())
    (home / "disk").mkdir()
    (home / "disk" / "launcher.yaml").write_text(Path("launcher.yaml").read_text())
    first = entry("sft", output_dir="$SCRATCH/first") | {"config": "~/sft.yaml"}
    policies = {"a": "{sft}", "b": "~/b", "c": {"path": "$SCRATCH/c", "optional": True}, "d": None}
    last = entry("sample", "dpo", policies=policies, groups="$SCRATCH/groups") | {"recipe": "sample"}
    project.write(accelerate_config="$SCRATCH/launcher.yaml", stages=[first, last])
    pipeline = project.read()
    sft, sample = pipeline.stages
    assert pipeline.file.accelerate_config == str(home / "disk" / "launcher.yaml")
    assert sft.folder == home / "disk" / "first"
    places = {"a": str(sft.folder), "b": str(home / "me" / "b"), "c": {"path": str(home / "disk" / "c"), "optional": True}}
    assert sample.values["policies"] == places | {"d": None}
    assert sample.values["groups"] == str(home / "disk" / "groups")


def test_rounds_start_from_a_policy_in_the_home_folder(project, home):
    ppo = entry("ppo", "dpo", start_from="{ppo|}", reward_funcs=["~/reward", "{ppo|}"]) | {"recipe": "ppo", "each_round": True}
    project.write(output_dir="~/runs", rounds=2, stages=[ppo])
    first, second = project.read().stages
    assert first.values["reward_funcs"] == [str(home / "me" / "reward"), ""]
    assert second.values["start_from"] == str(home / "me" / "runs" / "round-1" / "ppo")


def test_labels_in_the_home_folder_are_no_input(project, home):
    """Or every label would repeat the stage."""
    Path("rank.yaml").write_text("labeller: {store: ~/labels.sqlite}\n")
    project.write(stages=[entry("rank", "rank", groups="~/groups")])
    before = project.read().stages[0].fingerprint
    (home / "me" / "labels.sqlite").write_text("a label")
    assert project.read().stages[0].fingerprint == before
    (home / "me" / "groups").mkdir()
    (home / "me" / "groups" / "groups.jsonl").write_text("{}")
    assert project.read().stages[0].fingerprint != before


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"output_dir": "$NOWHERE/runs"}, "output_dir: "),
        ({"accelerate_config": "${NOWHERE}/launcher.yaml"}, "accelerate_config: "),
        ({"stages": [entry("sft", output_dir="$NOWHERE/sft")]}, "stages, entry 1: arguments: output_dir: "),
        ({"stages": [entry("sft", needs=["runs/~/sft"])]}, "stages, entry 1: arguments: needs, entry 1: "),
    ],
)
def test_what_has_no_meaning_is_refused_with_its_key(project, changes, key):
    project.write(**changes)
    with pytest.raises(RecipeError, match=rf"^pipeline\.yaml: {key}.*Fix: "):
        project.read()


def test_a_plan_knows_what_is_needed_from_the_home_folder(project, home):
    """The stage that `needs` names writes the folder that `start_from` reads: one in `~`, one in `$HOME`."""
    for name, changes in {
        "sft": {"output_dir": "~/sft", "lora_r": 5},
        "dpo": {"needs": ["$HOME/sft.yaml"], "start_from": "${HOME}/sft"},
    }.items():
        values = yaml.safe_load((ROOT / "configs" / "tiny" / f"{name}.yaml").read_text())
        (home / "me" / f"{name}.yaml").write_text(yaml.safe_dump(values | changes))
    (stage,) = plannable_stages(home / "me" / "dpo.yaml", ROOT / "recipes")
    assert stage.start_from == str(home / "me" / "sft")
    assert stage.producers[stage.start_from].lora_r == 5
