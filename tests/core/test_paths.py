"""`~` and `$NAME` in every key that names a path: one meaning, in all recipes and pipelines."""

from pathlib import Path

from rlhf_recipes.config.parser import merge_overrides
from rlhf_recipes.config.policy import PolicyArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import RECIPE
from rlhf_recipes.core.paths import PATH_KEYS, expand_path, expand_paths, user_path
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.pipeline.running import read_pipeline
from rlhf_recipes.stages import STAGES, parse_arguments
from rlhf_recipes.training import dependencies
from support import ROOT

import pytest
import yaml

WRITTEN = ("~/a", "$HOME/a", "${HOME}/a", "$TEST_ROOT/me/a", "$TEST_TILDE/a", "~")
WRONG = ("$TEST_NONE/a", "runs/${TEST_NONE}", "~test_nobody/a", "runs/~/a", "$TEST_EMPTY/a")
NESTED = {
    "policies": lambda path: {"sft": path, "best": {"path": path, "optional": True}},
    "reward_funcs": lambda path: [path, {"path": path, "weight": 1.0}],
    "rewards": lambda path: [path, {"path": path, "arguments": {"model_name_or_path": path}}],
    "frontier": lambda path: [path],
    "needs": lambda path: [path],
    "datasets": lambda path: [{"path": path}, {"path": "json", "data_files": {"train": path}}],
    "eval_datasets": lambda path: [{"path": path}],
    "demonstrations": lambda path: [{"path": path}],
    "ptx_dataset": lambda path: [{"path": path}],
    "labeller": lambda path: {"store": path},
    "model_init_kwargs": lambda path: {"cache_dir": path},
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name, value in (("HOME", "me"), ("TEST_ROOT", ""), ("TEST_TILDE", None), ("TEST_EMPTY", None)):
        monkeypatch.setenv(name, str(tmp_path / value) if value is not None else "~" if name == "TEST_TILDE" else "")
    monkeypatch.delenv("TEST_NONE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "me"


def texts(value):
    """Yield the texts in a value, whatever holds them."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(item)
    if hasattr(value, "path"):  # a source of data
        yield from texts([value.path, value.data_files])


def own_paths(recipe):
    """Return the keys of a recipe that name paths, also within lists and mappings."""
    keys = {name for cls in STAGES[recipe].argument_classes() for name in cls.__dataclass_fields__}
    return sorted(keys & (PATH_KEYS | NESTED.keys()) - {"config"})


@pytest.mark.parametrize("written", WRITTEN)
def test_one_meaning(home, written):
    assert expand_path(written) == str(home if written == "~" else home / "a")
    assert user_path(written) == Path(expand_path(written))


@pytest.mark.parametrize("text", ["runs/a", "somebody/model-1", "/data/~backup/x", "a.b.c", "cost$.jsonl", "x~", ""])
def test_other_paths_stay(text):
    assert expand_path(text) == text


@pytest.mark.parametrize("text", WRONG)
def test_what_has_no_meaning_is_refused(text):
    with pytest.raises(RecipeError, match=r"start_from: .*Fix: "):
        expand_paths({"start_from": text})


def test_text_that_is_no_path_stays():
    values = {"eos_token": "$HOME", "system_prompt": "$5 or ~ 3", "labeller": {"url": "http://x/~me", "api_key": "$KEY"}}
    assert expand_paths(values) == values
    assert expand_paths({"dataset_arguments": {"file": "~/a", "pattern": "^$TEST_NONE/"}})["dataset_arguments"] == {
        "file": str(Path("~/a").expanduser()),
        "pattern": "^$TEST_NONE/",
    }


@pytest.mark.parametrize("recipe", STAGES)
def test_every_key_of_a_recipe(home, tmp_path, recipe):
    """In its YAML file; none stays as written."""
    tiny = read_yaml(ROOT / "configs" / "tiny" / f"{recipe}.yaml")
    for key in own_paths(recipe):
        if key in ("deepspeed", "fsdp_config"):  # Transformers reads them at once; see above
            continue
        value = NESTED.get(key, str)("~/a")
        values = merge_overrides(tiny, {key: value})
        values |= {"choose": "disagreement"} if key == "reward" and recipe == "rank" else {}
        (tmp_path / "my.yaml").write_text(yaml.safe_dump(values))
        groups = parse_arguments(ROOT / "recipes" / f"{recipe}.py", argv=["--config", "$TEST_ROOT/my.yaml"])
        (read,) = (getattr(group, key) for group in groups if hasattr(group, key))
        assert {text for text in texts(read) if "a" in Path(text).name} == {str(home / "a")}, key


@pytest.mark.parametrize("argv", [("--output_dir=~/a",), ("--datasets", "$HOME/a"), ("--eval_datasets", '[{"path": "~/a"}]')])
def test_command_line(home, argv):
    groups = parse_arguments(ROOT / "recipes" / "sft.py", argv=list(argv))
    values = {key: value for group in groups for key, value in vars(group).items()}
    assert str(home / "a") in texts(values[argv[0].removeprefix("--").split("=")[0]])
    with pytest.raises(RecipeError, match=r"^the command line: start_from: \$TEST_NONE/a: "):
        parse_arguments(ROOT / "recipes" / "dpo.py", argv=["--start_from", "$TEST_NONE/a"])


def test_pipeline_and_its_stages(home, tmp_path):
    """The pipeline's own files, its stages' and their placeholders are in the same folders."""
    entries = [
        {"name": "sft", "config": "$TEST_ROOT/sft.yaml"},
        {"name": "sample", "config": "${TEST_ROOT}/sample.yaml", "arguments": {"policies": {"sft": "{sft}", "other": "~/b"}}},
    ]
    for name in ("sft", "sample"):
        (tmp_path / f"{name}.yaml").write_text((ROOT / "configs" / "tiny" / f"{name}.yaml").read_text())
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"output_dir": "~/runs", "stages": entries}))
    pipeline = read_pipeline(tmp_path / "pipeline.yaml", ROOT / "recipes")
    sft, sample = pipeline.stages
    assert (sft.folder, pipeline.folder) == (home / "runs" / "sft", home / "runs")
    assert sample.values["policies"] == {"sft": str(home / "runs" / "sft"), "other": str(home / "b")}
    assert sample.inputs == ("sft",)


def test_dependency_in_the_home_folder_is_found(home, tmp_path, monkeypatch):
    (tmp_path / "sft.yaml").write_text("output_dir: ~/sft\n")
    (home / "sft").mkdir(parents=True)
    (home / "sft" / RECIPE).write_text("{}")
    monkeypatch.setattr(dependencies.subprocess, "run", lambda *_: pytest.fail("it has a result"))
    arguments = PolicyArguments(start_from=str(home / "sft"), needs=[str(tmp_path / "sft.yaml")])
    dependencies.run_dependencies(ROOT / "recipes" / "dpo.py", [arguments])
