"""A misspelt key or path is reported before PyTorch is imported."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.inspection import check_dotted_path, dataclass_fields
from rlhf_recipes.stages import STAGES
from support import ROOT

import pytest

CLASSES = {path: cls for stage in STAGES.values() for path, cls in zip(stage.arguments, stage.argument_classes(), strict=True)}
SHOW_IMPORTS = """
import atexit, runpy, sys
heavy = ("torch", "transformers", "trl", "accelerate", "datasets", "pandas")
atexit.register(lambda: print("imported:", *(name for name in heavy if name in sys.modules)))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def error_of(recipe, *words):
    """Run a recipe in a process of its own; return its message, which came before PyTorch."""
    command = [sys.executable, "-c", SHOW_IMPORTS, ROOT / "recipes" / f"{recipe}.py", *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "imported:\n"), run
    return run.stderr.removeprefix("error: ").strip()


@pytest.mark.parametrize("path", [*CLASSES, "rlhf_recipes.config.data.DatasetSource"])
def test_fields_of_argument_classes_are_read_from_their_text(path):
    cls = CLASSES.get(path) or __import__("rlhf_recipes.config.data", fromlist=["_"]).DatasetSource
    assert [*dataclass_fields(path)] == [item.name for item in dataclasses.fields(cls) if item.init]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfdef one(): ...", b"# -*- coding: latin-1 -*-\n# \xe9\ndef one(): ..."])
def test_files_of_other_encodings_are_read_as_python_does(tmp_path, monkeypatch, content):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"early_encoding_{len(content)}"
    (tmp_path / f"{name}.py").write_bytes(content)
    check_dotted_path(f"{name}.one")


def test_a_class_whose_text_is_not_found_is_imported(monkeypatch):
    assert dataclass_fields("no_such_module.Arguments") is None
    monkeypatch.setitem(sys.modules, "__main__", sys.modules[__name__])
    stage = dataclasses.replace(STAGES["merge"], arguments=("tests_without_a_file.Made",))
    made = type(sys)("tests_without_a_file")
    made.Made = dataclasses.make_dataclass("Made", [("size", int, 1)])
    monkeypatch.setitem(sys.modules, "tests_without_a_file", made)
    assert [*stage.argument_types()] == ["size"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose import would fail, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "early_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "plain.py").write_text(
        "import json as j\nif j:\n    def one(): ...\nx, (y, z) = 1, (2, 3)\nclass C: ...\n"
        "for n in 'a':\n    def looped(): ...\nmatch x:\n    case _:\n        def matched(): ...\n"
    )
    (folder / "starred.py").write_text("from json import *\n")
    (folder / "lazy.py").write_text("def __getattr__(name): ...\n")
    (folder / "broken.py").write_text("def one(:\n")
    (folder / "compiled.so").write_text("")
    return "early_package"


@pytest.mark.parametrize(
    "name",
    [
        "plain.one",
        "plain.j",
        "plain.x",
        "plain.z",
        "plain.C.method",
        "plain.looped",
        "plain.matched",
        "starred.loads",
        "lazy.any",
        "compiled.f",
    ],
)
def test_names_in_a_module_are_found_without_importing_it(package, name):
    check_dotted_path(f"{package}.{name}")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("early_package.plain.onee", "early_package.plain has no 'onee'; did you mean 'one'?"),
        ("early_package.plian.one", "early_package has no 'plian'; did you mean 'plain'?"),
        ("early_package.broken.one", "broken.py: not valid Python: "),
        ("no_such_package.one", "cannot import no_such_package .*: No module named 'no_such_package'"),
    ],
)
def test_a_misspelt_dotted_path(package, path, expected):
    with pytest.raises(RecipeError, match=expected):
        check_dotted_path(path)


# --- Recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "words", "expected"),
    [
        ("sft", ["--learning_rat", "1"], "the command line: unknown option '--learning_rat'; did you mean 'learning_rate'?"),
        ("dpo", ["--config", "nothing.yaml"], "nothing.yaml: no such file"),
        ("chat", ["--config", "my.yaml"], "my.yaml: line 2: unknown key 'sed'; did you mean 'seed'?"),
        ("sft", ["--config", "entries.yaml"], "entries.yaml: line 4: datasets, entry 2: unknown key 'fractoin'; did you mean"),
        ("sft", ["--config", "data.yaml"], "data.yaml: line 2: dataset_name: rows/mine.csv: there is no such file in "),
        ("sft", ["--dataset_name=./rows"], "the command line: dataset_name: ./rows: there is no such file or folder"),
        ("sft", ["--datasets", "a.b", "c.csv"], "the command line: datasets, entry 1: a.b: neither a file"),
        ("dpo", ["--start_from", "$NOWHERE/sft"], "the command line: start_from: $NOWHERE/sft: $NOWHERE is not set"),
        ("ppo", ["--start_from", "runs/sft"], "the command line: start_from: runs/sft: no adapter there"),
        ("reward", ["--model_name_or_path", "./base"], "the command line: model_name_or_path: ./base: no such folder"),
        ("ppo", ["--reward_funcs", "runs/reward"], "the command line: reward_funcs, entry 1: runs/reward: no such folder"),
        ("ppo", ["--reward_funcs", '{"path": "my.nothing"}'], "reward_funcs, entry 1: my.nothing: cannot import my "),
        ("evaluate", ["--config", "policies.yaml"], "policies.yaml: line 3: policies: dpo: runs/x holds no adapter"),
        (
            "rank",
            ["--groups", "runs/sample"],
            "the command line: groups: runs/sample: cannot be read (No such file or directory)",
        ),
        ("sample", ["--policies", '{"a": "runs/x"}'], "the command line: policies: a: runs/x holds no adapter"),
        ("merge", ["--adapter", "runs/ppo"], "the command line: adapter: runs/ppo holds no adapter"),
    ],
)
def test_a_recipe_reports_a_misspelt_key_or_path_at_once(tmp_path, monkeypatch, recipe, words, expected):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("policies: {base: null}\nsed: 3\n")
    Path("entries.yaml").write_text("datasets:\n- path: me/rows\n- path: me/more\n  fractoin: 0.5\n")
    Path("data.yaml").write_text("output_dir: runs\ndataset_name: rows/mine.csv\n")
    Path("policies.yaml").write_text("policies:\n  base: null\n  dpo: runs/x\n")
    assert expected in error_of(recipe, *words)


def test_stages_that_are_needed_are_checked_and_their_folders_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text("dataset_name: me/rows\noutput_dir: runs/sft\nlearning_rat: 1\n")
    Path("dpo.yaml").write_text("needs: [sft.yaml]\nstart_from: runs/sft\n")
    assert error_of("dpo", "--config", "dpo.yaml").startswith("sft.yaml: line 3: unknown key 'learning_rat'")
    Path("sft.yaml").write_text("dataset_name: me/rows\noutput_dir: runs/other\n")
    assert error_of("dpo", "--config", "dpo.yaml").startswith("dpo.yaml: line 2: start_from: runs/sft: ")


@pytest.mark.parametrize("recipe", ["pipeline", "plan", "chat", "label", "merge"])  # the others are launched by accelerate
def test_a_recipe_without_the_environment_says_how_to_activate_it(recipe):
    command = [sys.executable, "-S", ROOT / "recipes" / f"{recipe}.py"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stderr == "error: No module named 'rlhf_recipes'. Fix: run `source .venv/bin/activate` first\n"
    assert run.returncode == 1


# --- Pipelines -------------------------------------------------------------------------------------------


def write_pipeline(**stages):
    for name, values in stages.items():
        Path(f"{name}.yaml").write_text(json.dumps(values.pop("file", {}), indent=0))
    entries = [{"name": name, "config": f"{name}.yaml", "arguments": arguments} for name, arguments in stages.items()]
    Path("pipeline.yaml").write_text(json.dumps({"output_dir": "runs", "stages": entries}, indent=0))


def line(text, path="pipeline.yaml"):
    return next(number for number, line in enumerate(Path(path).read_text().splitlines(), 1) if text in line)


@pytest.mark.parametrize("recipe", ["pipeline", "plan"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "sft.yaml: line 2: unknown key 'learning_rat'"),
        (["--set", "sft.max_stps=3"], "--set: sft: unknown key 'max_stps'; did you mean 'max_steps'?"),
        (["--set", "stf.max_steps=3"], "--set: stf: is none of arguments, sft; did you mean 'sft'?"),
        (["--set", "arguments.sed=3"], "--set: arguments: no stage has the key 'sed'; did you mean 'seed'?"),
        (["--set", "job=3"], "--set: unknown key 'job'; did you mean 'jobs'?"),
        (["--set", "jobs=two"], "--set: jobs: 'two': "),
        (["--set", "sft.max_steps"], "--set: 'sft.max_steps'. Fix: write STAGE.KEY=VALUE"),
        (["--set", "sft.max_steps=[1"], "--set: sft.max_steps: not valid YAML: "),
    ],
)
def test_a_misspelt_key_of_a_pipeline(tmp_path, monkeypatch, recipe, words, expected):
    monkeypatch.chdir(tmp_path)
    write_pipeline(sft={"file": {"learning_rate" if words else "learning_rat": 1}})
    assert error_of(recipe, "--config", "pipeline.yaml", *words).startswith(expected)


INPUTS = {
    "start_from": ("dpo", "runs/typo/sft", "runs/typo/sft: no adapter there"),
    "reward_funcs": ("ppo", ["my.nothing"], "my.nothing: cannot import my"),
    "rewards": ("evaluate", [{"path": "runs/typo"}], "runs/typo: no such folder"),
    "policies": ("evaluate", {"sft": "runs/typo"}, "runs/typo holds no adapter"),
    "frontier": ("evaluate", ["runs/typo"], "runs/typo holds no adapter"),
    "groups": ("rank", "runs/typo", "runs/typo: cannot be read (No such"),
    "reward": ("rank", "runs/typo", "runs/typo: no such folder"),
    "labeller": ("rank", {"path": "my.nothing"}, "my.nothing: cannot import my"),
    "model_name_or_path": ("sample", "./typo", "./typo: no such folder"),
    "dataset_name": ("sample", "typo.jsonl", "typo.jsonl: there is no such file"),
    "eval_datasets": ("sft", [{"path": "rlhf_recipes.tiny.splits.promts"}], "rlhf_recipes.tiny.splits has no 'promts'"),
    "ptx_dataset": ("ppo", [{"path": "typo.jsonl"}], "typo.jsonl: there is no such file"),
}


@pytest.mark.parametrize("key", INPUTS)
def test_what_a_stage_names_is_looked_for_before_the_first_one(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    recipe, value, expected = INPUTS[key]
    write_pipeline(**{"reward": {}, recipe: {key: value}} if recipe != "reward" else {recipe: {key: value}})
    error = error_of("pipeline", "--config", "pipeline.yaml", "--dry-run")
    place, _, found = re.fullmatch(r"pipeline\.yaml: line (\d+): stages: (\w+): (.*)", error).groups()
    assert int(place) >= line(f'"{key}"')
    assert found.startswith(key)
    assert expected in found
