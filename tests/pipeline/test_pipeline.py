"""The pipeline: what is planned, skipped, begun again and gone on with."""

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.groups import read_groups
from rlhf_recipes.feedback.labels import Label, Store
from rlhf_recipes.pipeline import check_arguments, read_pipeline, reading, running
from support import ROOT

import pytest
import torch
import yaml
from safetensors.torch import load_file

RECIPES = ROOT / "recipes"
ENGINE = "compute_environment: LOCAL_MACHINE\nuse_cpu: true\nnum_processes: 1\ndistributed_type: 'NO'\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Three stages: `sft` reads a file, `dpo` the result of `sft`, and `other` neither."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text('{"text": "one"}\n')
    Path("sft.yaml").write_text("dataset_name: data.jsonl\nlearning_rate: 1.0e-3\noutput_dir: elsewhere\nneeds: [first.yaml]\n")
    Path("dpo.yaml").write_text("beta: 0.1\n")
    Path("engine.yaml").write_text(ENGINE)
    write(
        accelerate_config="engine.yaml",
        stages=[
            {"name": "sft", "config": "sft.yaml"},
            {"name": "other", "recipe": "sft", "config": "sft.yaml", "arguments": {"dataset_name": "a.b"}},
            {"name": "dpo", "config": "dpo.yaml", "arguments": {"start_from": "{sft}", "beta": 0.3}},
        ],
    )
    return tmp_path


def write(**changes):
    path = Path("pipeline.yaml")
    values = yaml.safe_load(path.read_text()) if path.exists() else {"output_dir": "runs"}
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))


@pytest.fixture
def launched(monkeypatch):
    """What was launched, instead of launching it: the name of each stage, and whether it was to go on."""
    calls = []

    def run(command, pass_fds, stdout=None, stderr=None, env=None):
        config = Path(command[command.index("--config") + 1])
        folder = Path(yaml.safe_load(config.read_text())["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        calls.append((config.stem, "--resume_from_checkpoint" in command))
        run.environments[config.stem] = env
        if stdout:
            stdout.write(f"{config.stem} says this\n")
        if config.stem not in run.failing:
            (folder / "recipe.json").write_text(json.dumps({"calls": len(calls)}))
            (folder / "metrics.json").write_text(json.dumps({"calls": len(calls)}))
        if config.stem in run.together:
            run.barrier.wait()
        return subprocess.CompletedProcess(command, returncode=config.stem in run.failing)

    run.failing, run.calls, run.environments = set(), calls, {}
    run.together, run.barrier = set(), threading.Barrier(2, timeout=20)
    monkeypatch.setattr(subprocess, "run", run)
    return run


def pipeline(only=None):
    return read_pipeline(Path("pipeline.yaml"), RECIPES, only)


def run(only=None):
    pipeline(only).run()


def test_stages_have_their_own_arguments_and_the_results_of_others(project, launched):
    run()
    assert launched.calls == [("sft", False), ("other", False), ("dpo", False)]
    written = {name: yaml.safe_load(Path(f"runs/configs/{name}.yaml").read_text()) for name in ("sft", "other", "dpo")}
    assert written["sft"] == {"dataset_name": "data.jsonl", "learning_rate": 1e-3, "output_dir": "runs/sft"}
    assert (written["other"]["dataset_name"], written["other"]["output_dir"]) == ("a.b", "runs/other")
    assert written["dpo"] == {"beta": 0.3, "output_dir": "runs/dpo", "start_from": "runs/sft"}


def test_what_is_done_is_skipped_and_said_so(project, launched, capsys):
    run()
    launched.calls.clear()
    run()
    assert not launched.calls
    assert "[1/3] sft: done already, with these arguments and inputs: skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda: Path("sft.yaml").write_text("dataset_name: data.jsonl\nlearning_rate: 2.0e-3\n"), ["sft", "other", "dpo"]),
        (lambda: Path("data.jsonl").write_text('{"text": "one more"}\n'), ["sft", "dpo"]),
        (lambda: Path("dpo.yaml").write_text("beta: 0.1\nlearning_rate: 1.0e-4\n"), ["dpo"]),
        (lambda: shutil.rmtree("runs/other"), ["other"]),
        (lambda: Path("runs/other/recipe.json").unlink(), ["other"]),
        (lambda: Path("runs/other/recipe.json").write_text("of another run"), ["other"]),
        (lambda: Path("engine.yaml").write_text("num_processes: 2"), ["sft", "other", "dpo"]),
    ],
    ids=["arguments", "data", "the last stage", "gone", "no result", "another result", "engine"],
)
def test_what_has_changed_is_run_again_and_what_stands_on_it(project, launched, change, again):
    run()
    launched.calls.clear()
    change()
    assert [line.split(": ")[0].split(". ")[1] for line in pipeline().plan() if not line.endswith(": done")] == again
    run()
    assert launched.calls == [(name, False) for name in again]


def test_a_stage_that_was_broken_off_goes_on_and_those_before_it_are_skipped(project, launched):
    launched.failing = {"dpo"}
    with pytest.raises(RecipeError, match="stages: dpo did not finish; its own message is above"):
        run()
    launched.failing = set()
    launched.calls.clear()
    assert list(pipeline().plan())[-1].endswith(": begun")
    run()
    assert launched.calls == [("dpo", True)]


def test_with_other_arguments_it_begins_anew(project, launched):
    launched.failing = {"dpo"}
    with pytest.raises(RecipeError):
        run()
    launched.failing = set()
    launched.calls.clear()
    Path("dpo.yaml").write_text("beta: 0.1\nlearning_rate: 1.0e-4\n")
    run()
    assert launched.calls == [("dpo", False)]


def test_stages_can_be_chosen(project, launched):
    run(["sft", "dpo"])
    assert [name for name, _ in launched.calls] == ["sft", "dpo"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": []}, "pipeline.yaml: unknown key 'stage'; did you mean 'stages'?"),
        ({"output_dir": None}, "output_dir: name the folder"),
        ({"stages": []}, "stages: must be a list"),
        (
            {"stages": [{"name": "sft", "configs": "sft.yaml"}]},
            "stages, entry 1: unknown key 'configs'; did you mean 'config'?",
        ),
        ({"stages": [{"name": "a b"}]}, "stages, entry 1: name: 'a b' is no name"),
        (
            {"stages": [{"name": "sftt"}]},
            "entry 1: recipe: 'sftt' is none of sft, reward, ppo, dpo, sample, rank, evaluate; did you mean 'sft'?",
        ),
        ({"stages": [{"name": "sft", "config": "sft.yml"}]}, "sft.yml: no such file; did you mean"),
        ({"stages": [{"name": "sft", "config": "sft.yaml"}] * 2}, "entry 2: name: 'sft' stands twice"),
        (
            {"stages": [{"name": "dpo", "config": "dpo.yaml", "arguments": {"start_from": "{stf}"}}]},
            "stages, entry 1: start_from: {stf} is no stage before this one",
        ),
        ({"stages": [{"name": "sft"}]}, "entry 1: config: name the YAML file of its recipe, such as configs/tiny/sft.yaml"),
        ({"stages": [{"name": "sft", "config": 5}]}, "entry 1: config: name the YAML file"),
        (
            {"stages": [{"name": "sft", "config": "sft.yaml", "arguments": ["a"]}]},
            "arguments: must be a mapping of keys of sft.py",
        ),
        (
            {"seeds": [0, 1], "stages": [{"name": "sft", "config": "sft.yaml", "arguments": {"output_dir": "here"}}]},
            "stages: sft-0 and sft-1 both write to here: leave `output_dir` out",
        ),
        ({"accelerate_config": "missing.yaml"}, "accelerate_config: 'missing.yaml' is no file"),
    ],
)
def test_what_is_wrong_is_named(project, changes, message):
    write(**changes)
    with pytest.raises(RecipeError) as caught:
        pipeline()
    assert message in str(caught.value)


def test_the_accelerate_config_is_looked_for_as_those_of_stages_are(project):
    write(accelerate_config="configs/accelerate/ddp.yaml")
    assert pipeline().accelerate_config == str(ROOT / "configs" / "accelerate" / "ddp.yaml")


@pytest.mark.parametrize(
    ("engine", "recipe", "arguments", "message"),
    [
        ("fsdp", "ppo", {"critic": "adapter"}, "entry 2: late: critic: adapter: FSDP"),
        ("fsdp", "dpo", {"optim": "paged_adamw_8bit"}, "entry 2: late: optim: paged_adamw_8bit: bitsandbytes"),
        ("zero3", "ppo", {}, "entry 2: late: PPO does not run under DeepSpeed ZeRO-3"),
        ("zero2", "reward", {"ensemble_size": 2}, "entry 2: late: ensemble_size: DeepSpeed"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_before_the_first_stage_runs(project, engine, recipe, arguments, message):
    stages = [
        {"name": "sft", "config": "sft.yaml"},
        {"name": "late", "recipe": recipe, "config": "dpo.yaml", "arguments": arguments},
    ]
    write(accelerate_config=f"configs/accelerate/{engine}.yaml", stages=stages)
    with pytest.raises(RecipeError) as caught:
        pipeline()
    assert f"pipeline.yaml: stages, {message}" in str(caught.value)
    write(accelerate_config="configs/accelerate/ddp.yaml")
    pipeline()


def test_the_engine_that_accelerate_finds_by_itself_is_heeded(project, monkeypatch):
    monkeypatch.setattr(reading, "default_config_file", str(ROOT / "configs" / "accelerate" / "zero3.yaml"))
    stages = [{"name": "ppo", "config": "dpo.yaml"}]
    write(stages=stages)
    pipeline()
    write(stages=stages, accelerate_config=None)
    with pytest.raises(RecipeError, match="PPO does not run under DeepSpeed ZeRO-3"):
        pipeline()


def test_values_that_are_no_paths_and_keys_of_any_type_are_read(project):
    arguments = {"policies": {1: "a", "b": None}, "judge": {"instructions": "long " * 60, "home": "~nobody-here/x"}}
    write(stages=[{"name": "evaluate", "config": "dpo.yaml", "arguments": arguments}])
    assert pipeline().stages[0].values["policies"] == {1: "a", "b": None}


def test_a_stage_that_is_not_there_cannot_be_chosen(project):
    with pytest.raises(RecipeError, match="--stages: 'stf' is none of sft, other, dpo; did you mean 'sft'"):
        pipeline(["stf"])


@pytest.mark.parametrize("config", [None, "engine.yaml"])
def test_each_stage_is_launched_by_accelerate_where_that_is_configured(project, tmp_path, monkeypatch, config):
    """With a recipe that only tells what it was given, in a process of its own."""
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "sft.py").write_text(
        "import json, os, sys, yaml, pathlib\n"
        "values = yaml.safe_load(open(sys.argv[2]))\n"
        "folder = pathlib.Path(values['output_dir'])\n"
        "folder.mkdir()\n"
        "told = {'argv': sys.argv[3:], 'accelerate': 'ACCELERATE_DYNAMO_BACKEND' in os.environ}\n"
        "(folder / 'told.json').write_text(json.dumps(told))\n"
    )
    write(stages=[{"name": "sft", "config": "sft.yaml"}], accelerate_config=config)
    read_pipeline(Path("pipeline.yaml"), recipes).run()
    told = json.loads(Path("runs/sft/told.json").read_text())
    assert told["argv"] == []
    assert told["accelerate"] == bool(config)


def wait_for(path):
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise TimeoutError(path)


def test_a_stage_that_has_outlived_its_pipeline_is_not_written_over(project, tmp_path):
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "sft.py").write_text("import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n")
    write(stages=[{"name": "sft", "config": "sft.yaml"}])
    program = "from pathlib import Path\nfrom rlhf_recipes.pipeline import read_pipeline\n"
    program += f"read_pipeline(Path('pipeline.yaml'), Path({str(recipes)!r})).run()"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_for(Path("begun"))
        process.kill()
        process.wait()
        with pytest.raises(
            RecipeError, match="output_dir: runs: another pipeline, or a stage of one that was killed, still runs"
        ):
            run()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_the_plan_of_the_recipe_runs_nothing(project):
    command = [sys.executable, RECIPES / "pipeline.py", "--config", "pipeline.yaml", "--dry-run"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert printed == [
        "1. sft: recipes/sft.py -> runs/sft: to do",
        "2. other: recipes/sft.py -> runs/other: to do",
        "3. dpo: recipes/dpo.py -> runs/dpo, reads sft: to do",
    ]
    assert not Path("runs").exists()


def test_with_seeds_everything_is_done_once_for_each(project, launched):
    write(seeds=[3, 4])
    values = yaml.safe_load(Path("pipeline.yaml").read_text())
    values["stages"][1]["arguments"]["dataset_arguments"] = {"seed": "{seed}"}
    write(stages=values["stages"])
    run(["sft", "other"])
    assert [name for name, _ in launched.calls] == ["sft-3", "other-3", "sft-4", "other-4"]
    run()
    assert [name for name, _ in launched.calls[4:]] == ["dpo-3", "dpo-4"]
    written = yaml.safe_load(Path("runs/configs/dpo-4.yaml").read_text())
    assert (written["seed"], written["output_dir"], written["start_from"]) == (4, "runs/seed-4/dpo", "runs/seed-4/sft")
    assert yaml.safe_load(Path("runs/configs/other-3.yaml").read_text())["dataset_arguments"] == {"seed": 3}
    launched.calls.clear()
    run(["dpo"])
    assert not launched.calls


@pytest.mark.parametrize("seeds", [["a"], 0, [], [1, 1], [True]])
def test_seeds_are_different_whole_numbers(project, seeds):
    write(seeds=seeds)
    with pytest.raises(RecipeError, match=r"pipeline\.yaml: seeds: must be a list of whole numbers"):
        pipeline()


def test_a_misspelt_argument_of_the_last_stage_is_found_before_the_first_runs(project):
    values = yaml.safe_load(Path("pipeline.yaml").read_text())
    values["stages"][2]["arguments"]["max_stps"] = 3
    write(stages=values["stages"])
    with pytest.raises(RecipeError) as caught:
        check_arguments(pipeline(), Path("pipeline.yaml"))
    assert str(caught.value).startswith(
        "pipeline.yaml: stages: dpo (its YAML file with its `arguments`): unknown key 'max_stps'"
    )


def test_stages_side_by_side_are_said_to_be_at_work(project, launched, monkeypatch, capsys):
    write(jobs=2)
    monkeypatch.setattr(running, "PULSE", 0.05)

    def slowly(command, **options):
        folder = Path(yaml.safe_load(Path(command[command.index("--config") + 1]).read_text())["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").write_text(
            '{"loss": 1.0, "step": 10}\n{"loss": 0.5, "step": 20}\n' if folder.name == "sft" else ""
        )
        time.sleep(0.3)
        return launched(command, **options)

    monkeypatch.setattr(subprocess, "run", slowly)
    run()
    assert "      sft: step 20; other: at work\n" in capsys.readouterr().out


def test_data_that_are_not_there_are_found_before_the_first_stage_runs(project):
    values = yaml.safe_load(Path("pipeline.yaml").read_text())
    values["stages"][2]["arguments"]["datasets"] = [{"path": "{sft}/rows.jsonl"}, {"path": "nothing.jsonl"}]
    write(stages=values["stages"])
    with pytest.raises(RecipeError, match=r"stages: dpo .*: nothing\.jsonl: there is no such file"):
        check_arguments(pipeline(), Path("pipeline.yaml"))
    values["stages"][2]["arguments"]["datasets"].pop()
    write(stages=values["stages"])
    check_arguments(pipeline(), Path("pipeline.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"late\.jsonl: the file has no rows"),
        ('{"question": "a"}\n', r"late\.jsonl: the columns are question, but a stage on preference data needs one of: "),
        ('{"prompt": "a", \n', r"late\.jsonl: line 1, "),
    ],
)
def test_data_of_which_a_stage_can_make_nothing_are_found_before_the_first_one_runs(project, content, message):
    Path("late.jsonl").write_text(content)
    values = yaml.safe_load(Path("pipeline.yaml").read_text())
    arguments = values["stages"][2]["arguments"]
    for changed in ({"datasets": [{"path": "late.jsonl"}]}, {"dataset_name": "late.jsonl"}):
        values["stages"][2]["arguments"] = arguments | changed
        write(stages=values["stages"])
        with pytest.raises(RecipeError, match=rf"stages: dpo .*: {message}"):
            check_arguments(pipeline(), Path("pipeline.yaml"))


def test_files_in_a_folder_that_is_named_are_inputs_too(project, launched):
    Path("rows").mkdir()
    Path("rows/one.jsonl").write_text("{}")
    Path("rows/train").mkdir()
    Path("sft.yaml").write_text("dataset_name: rows\n")
    run()
    run()
    for name in ("one", "train/two"):
        launched.calls.clear()
        Path(f"rows/{name}.jsonl").write_text("{} ")
        run()
        assert launched.calls == [("sft", False), ("dpo", False)]


def test_a_base_that_is_named_by_a_dotted_path_is_an_input(project, monkeypatch):
    Path("package/base").mkdir(parents=True)
    Path("package/__init__.py").touch()
    Path("package/base/model.safetensors").write_text("weights")
    monkeypatch.syspath_prepend(project)
    Path("sft.yaml").write_text("model_name_or_path: package.base\n")
    before = pipeline().stages[0].fingerprint
    Path("package/base/model.safetensors").write_text("other weights")
    assert pipeline().stages[0].fingerprint != before


def test_a_stage_is_not_run_on_the_result_of_other_arguments(project, launched):
    run()
    launched.calls.clear()
    Path("sft.yaml").write_text("dataset_name: data.jsonl\nlearning_rate: 2.0e-3\n")
    with pytest.raises(RecipeError, match="--stages: dpo reads sft, which is not done with its present arguments and inputs"):
        run(["dpo"])
    assert not launched.calls


def test_what_other_arguments_have_overwritten_is_no_longer_done(project, launched):
    run()
    before = Path("sft.yaml").read_text()
    Path("sft.yaml").write_text("learning_rate: 2.0e-3\n")
    launched.failing = {"sft"}
    with pytest.raises(RecipeError):
        run()
    Path("sft.yaml").write_text(before)
    assert [pipeline().status(stage) for stage in pipeline().stages] == ["to do", "done", "done"]


def test_what_another_pipeline_has_done_meanwhile_is_done(project, launched):
    early = pipeline()
    run()
    launched.calls.clear()
    early.run()
    assert not launched.calls


@pytest.mark.parametrize("finished", [True, False])
def test_what_stood_on_other_data_is_not_gone_on_from(project, launched, finished):
    """Broken off before it trains, a stage would take the checkpoint of the run before for its own."""
    launched.failing = set() if finished else {"sft"}
    with contextlib.nullcontext() if finished else pytest.raises(RecipeError):
        run()
    old = [Path("runs/sft/checkpoint-4"), Path("runs/sft/member-0/checkpoint-4")]
    for folder in old:
        folder.mkdir(parents=True)
    Path("data.jsonl").write_text('{"text": "another"}\n')
    launched.failing = {"sft"}
    with pytest.raises(RecipeError):
        run()
    assert not any(folder.exists() for folder in old)
    begun = Path("runs/sft/checkpoint-2")
    begun.mkdir()
    launched.failing = set()
    launched.calls.clear()
    run()
    assert launched.calls[0] == ("sft", True)
    assert begun.exists()


def test_a_checkpoint_that_is_named_is_gone_on_from_under_other_arguments(project, launched):
    """As the message of a full GPU has it; a run anew would delete it."""
    launched.failing = {"sft"}
    with pytest.raises(RecipeError):
        run()
    old = [Path("runs/sft/checkpoint-4"), Path("runs/sft/checkpoint-8")]
    for folder in old:
        folder.mkdir(parents=True)
    stages = yaml.safe_load(Path("pipeline.yaml").read_text())["stages"]
    stages[0]["arguments"] = {"resume_from_checkpoint": str(old[0]), "per_device_train_batch_size": 1}
    write(stages=stages)
    with pytest.raises(RecipeError):
        run()
    assert all(folder.exists() for folder in old)
    assert launched.calls[-1] == ("sft", False)  # the one that is named, in its arguments


def test_stages_that_do_not_read_each_other_run_side_by_side(project, launched, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    write(jobs=2)
    launched.together = {"sft", "other"}  # each waits for the other
    run()
    assert {name for name, _ in launched.calls[:2]} == {"sft", "other"}
    assert launched.calls[2] == ("dpo", False)
    assert Path("runs/logs/sft.log").read_text() == "sft says this\n"
    assert launched.environments["sft"]["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 2))


def test_alone_and_last_a_stage_has_the_terminal(project, launched):
    write(jobs=2)
    run(["sft", "other"])
    run()
    assert launched.environments["dpo"] is None
    assert not Path("runs/logs/dpo.log").exists()


def test_what_runs_beside_a_stage_that_fails_is_let_finish(project, launched, capsys):
    write(jobs=2)
    launched.together, launched.failing = {"sft", "other"}, {"sft"}
    with pytest.raises(RecipeError, match="stages: sft did not finish"):
        run()
    assert {name for name, _ in launched.calls} == {"sft", "other"}
    assert "sft says this" in capsys.readouterr().out
    assert [pipeline().status(stage) for stage in pipeline().stages] == ["begun", "done", "to do"]


@pytest.mark.parametrize("jobs", [0, "two", True])
def test_jobs_are_a_number(project, jobs):
    write(jobs=jobs)
    with pytest.raises(RecipeError, match=r"pipeline\.yaml: jobs: .* 1 or more"):
        pipeline()


def test_what_goes_wrong_is_not_said_of_a_file_that_the_check_wrote(project, capsys):
    write(stages=[{"name": "dpo", "config": "dpo.yaml", "arguments": {"max_stps": 1}}])
    with pytest.raises(SystemExit), exit_on_recipe_error():
        check_arguments(pipeline(), Path("pipeline.yaml"))
    assert capsys.readouterr().err.startswith("error: pipeline.yaml: stages: dpo")


def test_evaluations_under_several_seeds_are_summed_up(project, launched):
    write(seeds=[3, 4], stages=[{"name": "evaluate", "config": "dpo.yaml"}])
    run()
    for seed, mean in ((3, 0.25), (4, 0.5)):
        policy = {"rewards": {"score": {"mean": mean}}, "win_rate": None, "kl": None, "entropy": None, "length": {"mean": 4.0}}
        metrics = {"seed": seed, "compare_with": "a", "kl_reference": "a", "rewards": {"score": {}}, "policies": {"a": policy}}
        Path(f"runs/seed-{seed}/evaluate/metrics.json").write_text(json.dumps(metrics))
    (text,) = pipeline().write_summaries()
    assert "| policy | score | length |\n|---|---|---|\n| a | 0.38 (0.25 to 0.50) | 4.00 |" in text
    assert Path("runs/evaluate-over-seeds.md").read_text() in text + "\n"
    assert json.loads(Path("runs/evaluate-over-seeds.json").read_text())["scores"]["a"]["score"] == [0.25, 0.5]


# --- Rounds ----------------------------------------------------------------------------------------------


def in_rounds(**changes):
    """SFT; three rounds of a reward model on the results of all rounds, and of PPO from the newest policy; evaluation."""
    stages = [
        {"name": "sft", "config": "sft.yaml"},
        {
            "name": "reward",
            "config": "dpo.yaml",
            "each_round": True,
            "arguments": {"start_from": "{ppo|sft}", "dataset_arguments": {"seed": "{round}"}},
        },
        {
            "name": "ppo",
            "config": "dpo.yaml",
            "each_round": True,
            "arguments": {"start_from": "{ppo|sft}", "datasets": [{"path": "first.jsonl"}, {"path": "{reward*}/rows.jsonl"}]},
        },
        {"name": "evaluate", "config": "dpo.yaml", "arguments": {"policies": {"one": "{ppo@1}", "last": "{ppo}"}}},
    ]
    write(**({"rounds": 3, "stages": stages} | changes))
    return stages


def test_rounds_go_on_from_one_another(project, launched):
    in_rounds()
    run()
    turns = [f"{name}-round-{turn}" for turn in (1, 2, 3) for name in ("reward", "ppo")]
    assert [name for name, _ in launched.calls] == ["sft", *turns, "evaluate"]
    written = {path.stem: yaml.safe_load(path.read_text()) for path in Path("runs/configs").iterdir()}
    assert [written[f"ppo-round-{turn}"]["start_from"] for turn in (1, 2, 3)] == [
        "runs/sft",
        "runs/round-1/ppo",
        "runs/round-2/ppo",
    ]
    assert written["reward-round-2"]["start_from"] == "runs/round-1/ppo"
    assert written["reward-round-2"]["dataset_arguments"] == {"seed": 2}
    assert [entry["path"] for entry in written["ppo-round-2"]["datasets"]] == [
        "first.jsonl",
        "runs/round-1/reward/rows.jsonl",
        "runs/round-2/reward/rows.jsonl",
    ]
    assert written["evaluate"]["policies"] == {"one": "runs/round-1/ppo", "last": "runs/round-3/ppo"}
    inputs = {stage.name: stage.inputs for stage in pipeline().stages}
    assert inputs["ppo-round-2"] == ("ppo-round-1", "reward-round-1", "reward-round-2")


def test_a_later_round_is_done_anew_where_an_earlier_one_is(project, launched):
    stages = in_rounds()
    run()
    launched.calls.clear()
    stages[1]["arguments"]["dataset_arguments"] = {"seed": "{round}", "rows": 3}
    write(stages=stages)
    assert [stage.name for stage in pipeline().stages if pipeline().status(stage) == "done"] == ["sft"]


def test_what_is_not_there_yet_may_be_left_empty(project):
    stages = in_rounds()
    stages[1]["arguments"] = {"reward": "{ppo|}"}
    write(stages=stages)
    values = [stage.values["reward"] for stage in pipeline().stages if stage.entry == "reward"]
    assert values == ["", "runs/round-1/ppo", "runs/round-2/ppo"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds: 0 is not how often the stages with `each_round` are done: 1 or more"),
        ({"rounds": 2, "stages": [{"name": "sft", "config": "sft.yaml"}]}, "rounds: goes with `each_round: true`"),
        (
            {"stages": [{"name": name, "recipe": "sft", "config": "sft.yaml", "each_round": name != "b"} for name in "abc"]},
            "stages: those with `each_round: true` must follow one another",
        ),
        (
            {"stages": [{"name": "ppo", "config": "dpo.yaml", "each_round": True, "arguments": {"start_from": "{ppo}"}}]},
            "stages, entry 1: start_from: {ppo} is no stage before this one",
        ),
        (
            {"stages": [{"name": "ppo", "config": "dpo.yaml", "each_round": True, "arguments": {"x": ["{sft*}"]}}]},
            "stages, entry 1: x: {sft} is no stage before this one",
        ),
    ],
)
def test_rounds_that_cannot_be_are_refused(project, changes, message):
    in_rounds(**changes)
    with pytest.raises(RecipeError) as caught:
        pipeline()
    assert message in str(caught.value)


@pytest.fixture
def in_process(monkeypatch):
    """Stages are run in this process, which has loaded already what they load; the names of those that were."""
    begun = []

    def run(command, pass_fds, **_):
        recipe = next(place for place, word in enumerate(command) if word.endswith(".py"))
        begun.append(Path(command[recipe + 2]).stem)
        monkeypatch.setattr(sys, "argv", command[recipe:])
        try:
            runpy.run_path(command[recipe], run_name="__main__")
        except SystemExit as stop:
            return subprocess.CompletedProcess(command, stop.code)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return begun


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
    """Anna prefers the second answer of all that she is given; their prompts."""
    prompts = []
    with Store(path) as store:
        while group := store.claim("anna"):
            store.save(Label(group.id, "anna", [2, 1]))
            prompts.append(group.prompt)
    return prompts


def rows(folder):
    return [json.loads(line) for line in (folder / "rankings.jsonl").read_text().splitlines()]


def test_people_label_round_after_round_in_one_store(project, tmp_path, in_process):
    """Each round waits for its labels, and they change nothing of the rounds before."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "sample.py").write_text(SAMPLE)
    shutil.copy(RECIPES / "rank.py", recipes)
    Path("rank.yaml").write_text("labeller: {store: labels.sqlite}\n")
    sample = {"name": "sample", "config": "dpo.yaml", "arguments": {"seed": "{round}"}}
    rank = {"name": "rank", "config": "rank.yaml", "arguments": {"groups": "{sample}"}}
    write(rounds=2, stages=[entry | {"each_round": True} for entry in (sample, rank)])

    def run():
        in_process.clear()
        read_pipeline(Path("pipeline.yaml"), recipes).run()

    for turn in (1, 2):
        with pytest.raises(RecipeError, match=f"stages: rank-round-{turn} did not finish"):
            run()
        assert label_all("labels.sqlite") == [f"Question {turn}.{number}?" for number in range(3)]
    run()
    assert in_process == ["rank-round-2"]
    for turn in (1, 2):
        ranked = [(row["prompt"], row["ranks"]) for row in rows(Path(f"runs/round-{turn}/rank"))]
        assert ranked == [(f"Question {turn}.{number}?", [2, 1]) for number in range(3)]
    with Store("labels.sqlite") as store:
        store.undo("anna")
    run()
    assert in_process == []


def test_two_rounds_from_sampling_to_ppo(tmp_path, in_process):
    """Real stages, small: the second round goes on from the first, on what the members of its reward ensemble doubt most."""
    quick = {"eval_strategy": "no", "save_strategy": "no", "per_device_train_batch_size": 16}
    once = quick | {"dataset_name": None, "dataset_arguments": {}, "num_train_epochs": 1}
    stages = [
        {"name": "sft", "arguments": quick | {"dataset_arguments": {"rows": 64}}},
        {
            "name": "sample",
            "arguments": {
                "policies": {"now": "{ppo|sft}"},
                "temperature": 2.0,
                "dataset_arguments": {"rows": 16, "seed": "{round}"},
            },
        },
        {"name": "rank", "arguments": {"groups": "{sample}", "choose": "disagreement", "reward": "{reward|}", "num_groups": 4}},
        {
            "name": "reward",
            "arguments": once | {"datasets": [{"path": "{rank*}/rankings.jsonl"}], "ensemble_size": 2},
        },
        {
            "name": "ppo",
            "arguments": quick
            | {"start_from": "{ppo|sft}", "reward_funcs": ["{reward}"], "value_warmup_steps": 0}
            | {"dataset_arguments": {"rows": 32, "seed": "{round}"}},
        },
    ]
    for number, stage in enumerate(stages):
        stage |= {"config": f"configs/tiny/{stage['name']}.yaml", "each_round": number > 0}
    config = tmp_path / "rounds.yaml"
    config.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "runs"), "rounds": 2, "stages": stages}))
    read_pipeline(config, RECIPES).run()

    turns = [f"{name}-round-{turn}" for turn in (1, 2) for name in ("sample", "rank", "reward", "ppo")]
    assert in_process == ["sft", *turns]
    folders = [tmp_path / "runs" / f"round-{turn}" for turn in (1, 2)]
    groups = [[group.id for group in read_groups(folder / "sample")] for folder in folders]
    ranked = [[row["id"] for row in rows(folder / "rank")] for folder in folders]
    assert not set(groups[0]) & set(groups[1])
    for sampled, chosen in zip(groups, ranked, strict=True):
        assert 0 < len(chosen) <= 4 < len(sampled)
        assert set(chosen) <= set(sampled)
    policies = [load_file(folder / "ppo" / "adapter_model.safetensors") for folder in folders]
    assert any(not torch.equal(policies[0][name], policies[1][name]) for name in policies[0])
    in_process.clear()
    read_pipeline(config, RECIPES).run()
    assert in_process == []


def test_what_was_sampled_with_other_arguments_is_sampled_anew(project, launched):
    write(stages=[{"name": "sample", "config": "dpo.yaml"}])
    folder = Path("runs/sample")
    folder.mkdir(parents=True)
    for name in ("groups.jsonl", "sample.json"):
        (folder / name).write_text("{}")
    launched.failing = {"sample"}
    with pytest.raises(RecipeError):
        run()
    assert not list(folder.iterdir())
    (folder / "groups.jsonl").write_text("begun")
    with pytest.raises(RecipeError):
        run()
    assert launched.calls == [("sample", False), ("sample", False)], "it goes on by itself"
    assert (folder / "groups.jsonl").exists()
