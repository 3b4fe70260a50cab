"""Running a pipeline: what is skipped, run again, resumed, and run side by side."""

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.core.errors import LabelsMissingError, RecipeError
from rlhf_recipes.evaluation.types import to_json
from rlhf_recipes.feedback.groups import read_groups
from rlhf_recipes.feedback.labels import Label, Store
from rlhf_recipes.pipeline import running
from rlhf_recipes.pipeline.running import read_pipeline
from rlhf_recipes.stages import parse_arguments
from support import ROOT, run_recipe
from support.evaluations import evaluation_results, exactly, policy_result

import pytest
import torch
import yaml
from safetensors.torch import load_file

RECIPES = ROOT / "recipes"
SFT = {"name": "sft", "config": "sft.yaml"}


def written(name):
    return yaml.safe_load(Path(f"runs/configs/{name}.yaml").read_text())


def test_stages_get_their_arguments_and_the_results_of_others(project, launched):
    project.run()
    assert launched.calls == [("sft", False), ("other", False), ("dpo", False)]
    assert written("sft") == {"dataset_name": "data.jsonl", "learning_rate": 1e-3, "output_dir": "runs/sft"}
    assert (written("other")["dataset_name"], written("other")["output_dir"]) == ("me/rows", "runs/other")
    assert written("dpo") == {"beta": 0.3, "output_dir": "runs/dpo", "start_from": "runs/sft"}


def test_a_dry_run_prints_the_plan_and_runs_nothing(project, capsys):
    run_recipe("pipeline", "--config", "pipeline.yaml", "--dry-run")
    assert capsys.readouterr().out.splitlines() == [
        "1. sft: recipes/sft.py -> runs/sft: to do",
        "2. other: recipes/sft.py -> runs/other: to do",
        "3. dpo: recipes/dpo.py -> runs/dpo, reads sft: to do",
    ]
    assert not Path("runs").exists()


@pytest.mark.parametrize("config", [None, "launcher.yaml"])
def test_a_stage_is_launched_by_accelerate_where_that_is_configured(project, tmp_path, monkeypatch, config):
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "sft.py").write_text(
        "import json, os, sys, yaml, pathlib\n"
        "folder = pathlib.Path(yaml.safe_load(open(sys.argv[2]))['output_dir'])\n"
        "folder.mkdir()\n"
        "accelerate = 'ACCELERATE_DYNAMO_BACKEND' in os.environ\n"
        "(folder / 'launch.json').write_text(json.dumps({'argv': sys.argv[3:], 'accelerate': accelerate}))\n"
    )
    project.write(stages=[SFT], accelerate_config=config)
    project.read(recipes=recipes).run()
    assert json.loads(Path("runs/sft/launch.json").read_text()) == {"argv": [], "accelerate": bool(config)}


def test_a_stage_names_the_places_of_its_arguments_in_the_files_of_the_user(project, launched):
    project.change("other", learning_rate=-1.0)
    project.write(seeds=[3], arguments={"lora_r": 4})
    pipeline = project.read(settings=["other.lora_alpha=8"])
    pipeline.run()
    lines = Path("pipeline.yaml").read_text().splitlines()
    number = lines.index("    learning_rate: -1.0") + 1
    with pytest.raises(RecipeError, match=rf"^pipeline\.yaml: line {number}: stages: other: learning_rate: -1\.0: nothing"):
        parse_arguments(RECIPES / "sft.py", argv=["--config", "runs/configs/other-3.yaml"])
    entry = f"pipeline.yaml: line {lines.index('- name: other') + 1}: stages: other"
    comments = re.findall(r"^# (.*)\n(\w+):", Path("runs/configs/other-3.yaml").read_text(), re.MULTILINE)
    assert {key: place for place, key in comments} == {
        "dataset_name": f"pipeline.yaml: line {lines.index('    dataset_name: me/rows') + 1}: stages: other",
        "learning_rate": f"pipeline.yaml: line {number}: stages: other",
        "lora_r": f"pipeline.yaml: line {lines.index('  lora_r: 4') + 1}: arguments",
        "lora_alpha": "--set: other",
        "output_dir": entry,
        "seed": entry,
    }
    assert written("other-3")["lora_alpha"] == 8


# --- Skip, run again, resume -----------------------------------------------------------------------------


def test_done_stages_are_skipped(project, launched, capsys):
    project.run()
    launched.calls.clear()
    project.run()
    assert not launched.calls
    assert "[1/3] sft: skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "repeated"),
    [
        (lambda: Path("sft.yaml").write_text("dataset_name: data.jsonl\nlearning_rate: 2.0e-3\n"), ["sft", "other", "dpo"]),
        (lambda: Path("data.jsonl").write_text('{"text": "one more"}\n'), ["sft", "dpo"]),
        (lambda: Path("dpo.yaml").write_text("beta: 0.1\nlearning_rate: 1.0e-4\n"), ["dpo"]),
        (lambda: shutil.rmtree("runs/other"), ["other"]),
        (lambda: Path("runs/other/recipe.json").unlink(), ["other"]),
        (lambda: Path("runs/other/recipe.json").write_text("of another run"), ["other"]),
        (lambda: Path("launcher.yaml").write_text("num_processes: 2"), ["sft", "other", "dpo"]),
    ],
    ids=["arguments", "data", "the last stage", "no folder", "no result", "another result", "launcher"],
)
def test_changed_stages_and_those_that_read_them_run_again(project, launched, change, repeated):
    project.run()
    launched.calls.clear()
    change()
    lines = [line for line in project.read().describe() if not line.endswith(": done")]
    assert [line.split(": ")[0].split(". ")[1] for line in lines] == repeated
    project.run()
    assert launched.calls == [(name, False) for name in repeated]


def test_a_result_that_other_arguments_overwrote_is_not_done(project, launched):
    project.run()
    before = Path("sft.yaml").read_text()
    Path("sft.yaml").write_text("learning_rate: 2.0e-3\n")
    launched.failing = {"sft"}
    with pytest.raises(RecipeError):
        project.run()
    Path("sft.yaml").write_text(before)
    assert project.statuses() == ["to do", "done", "done"]


def test_what_another_pipeline_did_meanwhile_is_done(project, launched):
    early = project.read()
    project.run()
    launched.calls.clear()
    early.run()
    assert not launched.calls


@pytest.mark.parametrize("content", ['{"sft": "done"}', '{"sft": {}, "dpo": null}', "[]", '{"sft": '])
def test_a_damaged_state_is_one_message(project, content):
    Path("runs").mkdir()
    Path("runs/pipeline.json").write_text(content)
    with pytest.raises(RecipeError, match=r"^runs/pipeline\.json: "):
        project.read()


@pytest.mark.parametrize("written", ["runs/sft", "{cwd}/runs/sft", "./runs/sft/checkpoint-2"])
def test_a_stage_named_by_its_folder_is_an_input(project, launched, written):
    project.change("dpo", start_from=written.replace("{cwd}", str(Path.cwd())))
    assert project.read().stages[2].inputs == ("sft",)
    project.run()
    assert project.statuses() == ["done"] * 3  # although the folder has files now
    Path("data.jsonl").write_text('{"text": "one more"}\n')
    assert project.statuses() == ["to do", "done", "to do"]


def test_files_in_a_named_folder_are_inputs(project, launched):
    Path("rows/train").mkdir(parents=True)
    Path("rows/one.jsonl").write_text("{}")
    Path("sft.yaml").write_text("dataset_name: rows\n")
    project.run()
    for name in ("one", "train/two"):
        launched.calls.clear()
        Path(f"rows/{name}.jsonl").write_text("{} ")
        project.run()
        assert launched.calls == [("sft", False), ("dpo", False)]


def test_a_base_named_by_a_dotted_path_is_an_input(project, monkeypatch):
    Path("package/base").mkdir(parents=True)
    Path("package/__init__.py").touch()
    Path("package/base/model.safetensors").write_text("weights")
    monkeypatch.syspath_prepend(Path.cwd())
    Path("sft.yaml").write_text("model_name_or_path: package.base\n")
    before = project.read().stages[0].fingerprint
    Path("package/base/model.safetensors").write_text("other weights")
    assert project.read().stages[0].fingerprint != before


@pytest.mark.parametrize("same_arguments", [True, False])
def test_an_interrupted_stage_resumes_under_the_same_arguments_only(project, launched, same_arguments):
    launched.failing = {"dpo"}
    with pytest.raises(RecipeError, match="stages: dpo failed"):
        project.run()
    launched.failing = set()
    launched.calls.clear()
    assert project.statuses() == ["done", "done", "begun"]
    if not same_arguments:
        Path("dpo.yaml").write_text("beta: 0.1\nlearning_rate: 1.0e-4\n")
    project.run()
    assert launched.calls == [("dpo", same_arguments)]


@pytest.mark.parametrize("finished", [True, False])
def test_checkpoints_of_other_data_are_deleted(project, launched, finished):
    """Interrupted before it trains, a stage would take the checkpoint of the run before for its own."""
    launched.failing = set() if finished else {"sft"}
    with contextlib.nullcontext() if finished else pytest.raises(RecipeError):
        project.run()
    old = [Path("runs/sft/checkpoint-4"), Path("runs/sft/member-0/checkpoint-4")]
    for folder in old:
        folder.mkdir(parents=True)
    Path("data.jsonl").write_text('{"text": "another"}\n')
    launched.failing = {"sft"}
    with pytest.raises(RecipeError):
        project.run()
    assert not any(folder.exists() for folder in old)
    new = Path("runs/sft/checkpoint-2")
    new.mkdir()
    launched.failing = set()
    launched.calls.clear()
    project.run()
    assert launched.calls[0] == ("sft", True)
    assert new.exists()


def test_a_named_checkpoint_is_kept_under_other_arguments(project, launched):
    """The message about a full GPU suggests to resume so."""
    launched.failing = {"sft"}
    with pytest.raises(RecipeError):
        project.run()
    old = [Path("runs/sft/checkpoint-4"), Path("runs/sft/checkpoint-8")]
    for folder in old:
        folder.mkdir(parents=True)
    project.change("sft", resume_from_checkpoint=str(old[0]), per_device_train_batch_size=1)
    with pytest.raises(RecipeError):
        project.run()
    assert all(folder.exists() for folder in old)
    assert launched.calls[-1] == ("sft", False)  # the checkpoint is in its arguments


def test_samples_of_other_arguments_are_deleted(project, launched):
    project.write(stages=[{"name": "sample", "config": "dpo.yaml"}])
    folder = Path("runs/sample")
    folder.mkdir(parents=True)
    for name in ("groups.jsonl", "sample.json"):
        (folder / name).write_text("{}")
    launched.failing = {"sample"}
    with pytest.raises(RecipeError):
        project.run()
    assert not list(folder.iterdir())
    (folder / "groups.jsonl").write_text("partial")
    with pytest.raises(RecipeError):
        project.run()
    assert launched.calls == [("sample", False), ("sample", False)], "it resumes by itself"
    assert (folder / "groups.jsonl").exists()


# --- Selected stages, seeds, rounds ----------------------------------------------------------------------


def test_selected_stages_do_not_run_on_the_result_of_other_arguments(project, launched):
    project.run(["sft", "dpo"])
    assert [name for name, _ in launched.calls] == ["sft", "dpo"]
    Path("sft.yaml").write_text("dataset_name: data.jsonl\nlearning_rate: 2.0e-3\n")
    with pytest.raises(RecipeError, match="--stages: dpo reads sft"):
        project.run(["dpo"])
    assert len(launched.calls) == 2


def test_every_seed_runs_all_stages(project, launched):
    project.change("other", dataset_arguments={"seed": "{seed}"})
    project.write(seeds=[3, 4])
    project.run(["sft", "other"])
    assert [name for name, _ in launched.calls] == ["sft-3", "other-3", "sft-4", "other-4"]
    project.run()
    assert [name for name, _ in launched.calls[4:]] == ["dpo-3", "dpo-4"]
    dpo = written("dpo-4")
    assert (dpo["seed"], dpo["output_dir"], dpo["start_from"]) == (4, "runs/seed-4/dpo", "runs/seed-4/sft")
    assert written("other-3")["dataset_arguments"] == {"seed": 3}
    project.run(["dpo"])
    assert len(launched.calls) == 6


def test_evaluations_under_several_seeds_are_summarised(project, launched):
    project.write(seeds=[3, 4], stages=[{"name": "evaluate", "config": "dpo.yaml"}])
    project.run()
    for seed, mean in ((3, 0.25), (4, 0.5)):
        policy = policy_result(rewards={"score": exactly(mean)}, length=exactly(4.0))
        metrics = to_json(evaluation_results({"a": policy}, {"score": False}, seed=seed))
        Path(f"runs/seed-{seed}/evaluate/metrics.json").write_text(json.dumps(metrics))
    (text,) = project.read().write_summaries()
    assert "| policy | score | length |\n|---|---|---|\n| a | 0.38 (0.25 to 0.50) | 4.00 |" in text
    assert Path("runs/evaluate-over-seeds.md").read_text() in text + "\n"
    assert json.loads(Path("runs/evaluate-over-seeds.json").read_text())["scores"]["a"]["score"] == [0.25, 0.5]


def test_a_later_round_runs_again_after_an_earlier_one(project, launched):
    ppo = {"name": "ppo", "config": "dpo.yaml", "each_round": True, "arguments": {"start_from": "{ppo|sft}"}}
    project.write(rounds=3, stages=[SFT, ppo, {"name": "dpo", "config": "dpo.yaml", "arguments": {"start_from": "{ppo}"}}])
    project.run()
    assert [name for name, _ in launched.calls] == ["sft", "ppo-round-1", "ppo-round-2", "ppo-round-3", "dpo"]
    project.change("ppo", dataset_arguments={"rows": 3})
    assert project.statuses() == ["done", "to do", "to do", "to do", "to do"]


# --- Side by side ----------------------------------------------------------------------------------------


def test_independent_stages_run_side_by_side(project, launched, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    project.write(jobs=2)
    launched.together = {"sft", "other"}  # each waits for the other
    project.run()
    assert {name for name, _ in launched.calls[:2]} == {"sft", "other"}
    assert launched.calls[2] == ("dpo", False)
    assert Path("runs/logs/sft.log").read_text() == "output of sft\n"
    assert launched.environments["sft"]["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 2))


def test_a_stage_that_runs_alone_writes_to_the_terminal(project, launched):
    project.write(jobs=2)
    project.run(["sft", "other"])
    project.run()
    assert launched.environments["dpo"].get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")
    assert not Path("runs/logs/dpo.log").exists()


def test_stages_beside_a_failed_one_end(project, launched, capsys):
    project.write(jobs=2)
    launched.together, launched.failing = {"sft", "other"}, {"sft"}
    with pytest.raises(RecipeError, match="stages: sft failed"):
        project.run()
    assert {name for name, _ in launched.calls} == {"sft", "other"}
    assert "output of sft" in capsys.readouterr().out
    assert project.statuses() == ["begun", "done", "to do"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_warnings_of_all_stages_stand_at_the_end(project, launched, monkeypatch, capsys, jobs):
    def warns(command, **options):
        name = Path(command[-1]).stem
        Path(options["env"]["RLHF_RECIPES_WARNINGS"]).write_text(f"few rows\n{name} is slow\n")
        return launched(command, **options)

    monkeypatch.setattr(subprocess, "run", warns)
    project.write(jobs=jobs)
    launched.failing = {"dpo"}
    with pytest.raises(SystemExit), exit_on_recipe_error():
        project.run()
    *_, once_more = capsys.readouterr().err.partition("again:\n")
    *lines, error = once_more.splitlines()
    assert error.startswith("error: ")
    assert lines[-2:] == ["warning: dpo: few rows", "warning: dpo: dpo is slow"]
    assert {*lines[:4]} == {f"warning: {name}: {text}" for name in ("sft", "other") for text in ("few rows", f"{name} is slow")}
    with exit_on_recipe_error():  # those of stages that are done, too
        project.run(["sft"])
    again = ["Warnings of this run, again:", "warning: sft: few rows", "warning: sft: sft is slow"]
    assert capsys.readouterr().err.splitlines() == [*again[1:], *again]


def test_progress_of_stages_side_by_side_is_printed(project, launched, monkeypatch, capsys):
    project.write(jobs=2)
    monkeypatch.setattr(running, "PROGRESS_INTERVAL", 0.05)

    def slowly(command, **options):
        folder = Path(yaml.safe_load(Path(command[command.index("--config") + 1]).read_text())["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        log = '{"loss": 1.0, "step": 10}\n{"loss": 0.5, "step": 20}\n' if folder.name == "sft" else ""
        (folder / "log.jsonl").write_text(log)
        time.sleep(0.3)
        return launched(command, **options)

    monkeypatch.setattr(subprocess, "run", slowly)
    project.run()
    assert "      sft: step 20; other: running\n" in capsys.readouterr().out


def test_a_stage_that_outlives_its_pipeline_holds_the_lock(project, tmp_path):
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "sft.py").write_text("import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n")
    project.write(stages=[SFT])
    program = "from pathlib import Path\nfrom rlhf_recipes.pipeline.running import read_pipeline\n"
    program += f"read_pipeline(Path('pipeline.yaml'), Path({str(recipes)!r})).run()"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not Path("begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        with pytest.raises(RecipeError, match="output_dir: runs: another pipeline"):
            project.run()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


# --- Rounds of real stages -------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch):
    """Run stages in this process, which has imported their libraries; return the names of those that ran."""
    names = []

    def run(command, pass_fds, **_):
        recipe = next(place for place, word in enumerate(command) if word.endswith(".py"))
        names.append(Path(command[recipe + 2]).stem)
        monkeypatch.setattr(sys, "argv", command[recipe:])
        try:
            runpy.run_path(command[recipe], run_name="__main__")
        except SystemExit as stop:
            return subprocess.CompletedProcess(command, stop.code)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return names


SAMPLE = """
import json, pathlib, sys, yaml
values = yaml.safe_load(open(sys.argv[2]))
folder = pathlib.Path(values["output_dir"])
folder.mkdir(parents=True)
rows = [{"prompt": f"Question {values['seed']}.{number}?", "completions": ["a", "b"]} for number in range(3)]
(folder / "groups.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "sample.json").write_text("{}")
"""


def label_all(path):
    """Prefer the second completion of every group, and return the prompts."""
    prompts = []
    with Store(path) as store:
        while group := store.claim("anna"):
            store.save(Label(group.id, "anna", [2, 1]))
            prompts.append(group.prompt)
    return prompts


def read_rankings(folder):
    return [json.loads(line) for line in (folder / "rankings.jsonl").read_text().splitlines()]


def test_people_label_round_after_round_in_one_store(project, tmp_path, in_process):
    """Each round waits for its labels, which change nothing of the rounds before."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "sample.py").write_text(SAMPLE)
    shutil.copy(RECIPES / "rank.py", recipes)
    Path("rank.yaml").write_text("labeller: {store: labels.sqlite}\n")
    sample = {"name": "sample", "config": "dpo.yaml", "arguments": {"seed": "{round}"}}
    rank = {"name": "rank", "config": "rank.yaml", "arguments": {"groups": "{sample}"}}
    project.write(rounds=2, stages=[entry | {"each_round": True} for entry in (sample, rank)])

    def run():
        in_process.clear()
        project.read(recipes=recipes).run()

    for turn in (1, 2):
        with pytest.raises(LabelsMissingError, match=f"stages: rank-round-{turn} needs labels of people"):
            run()
        assert label_all("labels.sqlite") == [f"Question {turn}.{number}?" for number in range(3)]
    run()
    assert in_process == ["rank-round-2"]
    for turn in (1, 2):
        ranked = [(row["prompt"], row["ranks"]) for row in read_rankings(Path(f"runs/round-{turn}/rank"))]
        assert ranked == [(f"Question {turn}.{number}?", [2, 1]) for number in range(3)]
    with Store("labels.sqlite") as store:
        store.undo("anna")
    run()
    assert in_process == []


@pytest.mark.slow
def test_two_rounds_from_sampling_to_ppo(tmp_path, in_process):
    """The second round starts from the first, on what the members of its reward ensemble disagree about most."""
    quick = {"eval_strategy": "no", "save_strategy": "no", "per_device_train_batch_size": 16}
    once = quick | {"test_split_size": None, "num_train_epochs": 1, "warmup_steps": 0}
    ppo = {"start_from": "{ppo|sft}", "reward_funcs": ["{reward}"], "value_warmup_steps": 0}
    arguments = {
        "sft": quick | {"dataset_arguments": {"rows": 64}},
        "sample": {
            "policies": {"now": "{ppo|sft}"},
            "temperature": 2.0,
            "dataset_arguments": {"rows": 16, "seed": "{round}"},
        },
        "rank": {"groups": "{sample}", "choose": "disagreement", "reward": "{reward|}", "num_groups": 4},
        "reward": once | {"datasets": [{"path": "{rank*}/rankings.jsonl"}], "ensemble_size": 2},
        "ppo": quick | ppo | {"dataset_arguments": {"rows": 32, "seed": "{round}"}},
    }
    stages = [
        {"name": name, "config": f"configs/tiny/{name}.yaml", "arguments": values, "each_round": name != "sft"}
        for name, values in arguments.items()
    ]
    config = tmp_path / "rounds.yaml"
    config.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "runs"), "rounds": 2, "stages": stages}))
    read_pipeline(config, RECIPES).run()

    turns = [f"{name}-round-{turn}" for turn in (1, 2) for name in ("sample", "rank", "reward", "ppo")]
    assert in_process == ["sft", *turns]
    folders = [tmp_path / "runs" / f"round-{turn}" for turn in (1, 2)]
    sampled = [[group.id for group in read_groups(folder / "sample")] for folder in folders]
    assert not set(sampled[0]) & set(sampled[1])
    for groups, folder in zip(sampled, folders, strict=True):
        ranked = [row["id"] for row in read_rankings(folder / "rank")]
        assert 0 < len(ranked) <= 4 < len(groups)
        assert set(ranked) <= set(groups)
    policies = [load_file(folder / "ppo" / "adapter_model.safetensors") for folder in folders]
    assert any(not torch.equal(policies[0][name], policies[1][name]) for name in policies[0])
    in_process.clear()
    read_pipeline(config, RECIPES).run()
    assert in_process == []
