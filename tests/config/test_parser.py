"""The strict parser: what it accepts; everything else is one message with file, key and fix."""

import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.config.checks import check_process_group
from rlhf_recipes.config.current import set_trainer
from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.config.evaluate import EvaluateArguments
from rlhf_recipes.config.parser import parse_dataclasses
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.rewards.reward_funcs import load_rewards
from support import ROOT

import pytest
from trl import ModelConfig, SFTConfig

RECIPE = ROOT / "recipes" / "sft.py"


def parse(tmp_path, text, *argv, types=(DataArguments, SFTConfig, ModelConfig)):
    config = tmp_path / "my.yaml"
    config.write_text(text)
    return parse_dataclasses(RECIPE, *types, argv=["--config", str(config), *argv])


def message_of(tmp_path, text, *argv) -> str:
    with pytest.raises(RecipeError) as error:
        parse(tmp_path, text, *argv)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- What is accepted --------------------------------------------------------------------------------------


def test_command_line_overrides_the_file(tmp_path):
    data, training, model = parse(
        tmp_path,
        "dataset_name: d.jsonl\nlearning_rate: 1e-3\nseed: 3\nlora_r: 8\n",
        *("--seed", "7", "--use_peft", "--dtype=float32"),
    )
    assert (data.dataset_name, training.learning_rate, training.seed) == ("d.jsonl", 1e-3, 7)
    assert (model.lora_r, model.use_peft, model.dtype) == (8, True, "float32")


def test_default_config_is_the_tiny_one_of_the_recipe():
    _, training, _ = parse_dataclasses(RECIPE, DataArguments, SFTConfig, ModelConfig, argv=[])
    assert training.output_dir == "runs/tiny/sft"


def test_null_and_none_unset(tmp_path):
    assert parse(tmp_path, "max_length: null\n")[1].max_length is None
    assert parse(tmp_path, "", "--max_length", "none")[1].max_length is None
    data, *_ = parse(tmp_path, "dataset_name: a.csv\n", "--dataset_name", "none", "--datasets", "b.csv")
    assert data.dataset_name is None


def test_mixtures(tmp_path):
    entries = "  - path: a.csv\n    fraction: 0.5\n  - {path: b.csv, column_mapping: {q: prompt}}\n"
    data, *_ = parse(tmp_path, "datasets:\n" + entries)
    assert [source.path for source in data.datasets] == ["a.csv", "b.csv"]
    assert (data.datasets[0].fraction, data.datasets[1].column_mapping) == (0.5, {"q": "prompt"})
    data, *_ = parse(tmp_path, "", "--datasets", "a.csv", "b.csv")
    assert [source.path for source in data.datasets] == ["a.csv", "b.csv"]


def test_anchors_and_merge_keys(tmp_path):
    text = "datasets:\n  - &one {path: a.csv, split: x}\n  - {<<: *one, path: b.csv}\n"
    assert [(s.path, s.split) for s in parse(tmp_path, text)[0].datasets] == [("a.csv", "x"), ("b.csv", "x")]


def test_mappings_on_the_command_line_are_json(tmp_path):
    data, *_ = parse(tmp_path, "", "--dataset_arguments", '{"rows": 5}')
    assert data.dataset_arguments == {"rows": 5}
    spec, entries = '{"path": "a.b", "name": "one"}', '[{"path": "c.jsonl"}, {"path": "d.jsonl", "split": "test"}]'
    argv = ["--rewards", spec, "e.f", "--eval_datasets", entries]
    evaluation, sources = parse(tmp_path, "policies: {sft: null}\n", *argv, types=(EvaluateArguments, DataArguments))
    assert evaluation.rewards == [{"path": "a.b", "name": "one"}, "e.f"]
    assert [(source.path, source.split) for source in sources.eval_datasets] == [("c.jsonl", "train"), ("d.jsonl", "test")]


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        (
            "dataset_name: a.function\ndataset_arguments: {rows: 3}\neval_datasets: [{path: b.jsonl}]\n",
            ("--datasets", '{"path": "c.csv"}', "--test_split_size", "0.5"),
            {"dataset_name": None, "dataset_arguments": None, "eval_datasets": [], "test_split_size": 0.5},
        ),
        (
            "datasets: [{path: b.jsonl}]\ntest_split_size: 3\n",
            ("--dataset_name", "c.csv", "--eval_datasets", "d.csv"),
            {"dataset_name": "c.csv", "datasets": [], "test_split_size": None},
        ),
        (
            "dataset_name: a.function\ndataset_arguments: {rows: 3}\ncolumn_mapping: {q: prompt}\n",
            ("--dataset_name", "c.csv"),
            {"dataset_name": "c.csv", "dataset_arguments": None, "column_mapping": {"q": "prompt"}},
        ),
        (
            "dataset_name: a.function\ndataset_arguments: {rows: 3}\n",
            ("--dataset_name", "a.function"),
            {"dataset_arguments": {"rows": 3}},
        ),
    ],
    ids=["a mixture", "one dataset", "another dataset", "the same dataset"],
)
def test_data_on_the_command_line_replaces_the_data_of_the_file(tmp_path, text, argv, expected):
    data, *_ = parse(tmp_path, text, *argv)
    assert {key: getattr(data, key) for key in expected} == expected


def test_precision_follows_the_machine(tmp_path):
    assert parse(tmp_path, "")[1].bf16 is False
    assert parse(tmp_path, "use_cpu: true\n")[1].bf16 is False
    assert parse(tmp_path, "use_cpu: true\nbf16: true\n")[1].bf16 is True


def test_dotted_paths_are_resolved_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "rewards_nearby.py").write_text("def short(completions, **columns):\n    return [0.0 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    parse(tmp_path, "policies: {sft: null}\n", types=(EvaluateArguments,))
    (reward,), _ = load_rewards(["rewards_nearby.short"])
    assert reward(prompts=["a"], completions=["b"]) == [0.0]


# --- What is rejected --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("policies: {base: null, ppo: runs/ppo}", "compare_with: 'sft' .*base, ppo"),
        (
            "policies: {sft: runs/sft}\nrewards: [{path: runs/reward, name: model}]\njudge: Abstention",
            "judge: 'Abstention' .*model",
        ),
        ("judge: Abstention", "judge: 'Abstention' "),
    ],
)
def test_names_in_an_evaluation_are_checked_with_its_arguments(tmp_path, text, expected):
    """A pipeline parses them before its first stage."""
    with pytest.raises(RecipeError, match=expected):
        parse(tmp_path, text, types=(EvaluateArguments,))


@pytest.mark.parametrize(
    ("text", "argv", "parts"),
    [
        ("learning_rat: 1e-4\n", (), ("my.yaml", "'learning_rat'", "did you mean 'learning_rate'")),
        ("1: 2\n", (), ("my.yaml", "unknown key '1'")),
        ("output_dir: runs\nstages: []\n", (), ("my.yaml", "stages: ", "recipes/pipeline.py")),
        ("", ("--learning_rat", "1"), ("command line", "--learning_rat", "did you mean 'learning_rate'")),
        ("", ("--learning_rat=1",), ("command line", "did you mean 'learning_rate'")),
        ("", ("--learning", "1"), ("command line", "unknown option '--learning'")),
        ("", ("--seed", "1", "stray"), ("command line", "'stray'", "--key value")),
        ("", ("--dataset_arguments", "rows=5"), ("command line", "dataset_arguments", "JSON mapping")),
        ("seed: one\n", (), ("my.yaml", "seed", "int", "'one'")),
        ("seed: 1.5\n", (), ("my.yaml", "seed", "int", "1.5")),
        ("seed: true\n", (), ("my.yaml", "seed", "int", "True")),
        ("seed: '3'\n", (), ("my.yaml", "seed", "'3' (str)")),
        ("seed:\n", (), ("my.yaml", "seed", "int", "None")),
        ("learning_rate: fast\n", (), ("my.yaml", "learning_rate", "float", "'fast'")),
        ("learning_rate: .nan\n", (), ("my.yaml", "learning_rate", "nan")),
        ("learning_rate: 1e999\n", (), ("my.yaml", "learning_rate", "inf")),
        ("", ("--learning_rate", "fast"), ("command line", "learning_rate", "float", "'fast'")),
        ("use_peft: yes\n", (), ("my.yaml", "use_peft", "bool", "'yes'", "`true` or `false`")),
        ("dataset_name: 3\n", (), ("my.yaml", "dataset_name", "str", "3")),
        ("dataset_name: [a, b]\n", (), ("my.yaml", "dataset_name", "str")),
        ("model_init_kwargs: text\n", (), ("my.yaml", "model_init_kwargs", "dict", "'text'")),
        ("optim: adamw_torh\n", (), ("my.yaml", "optim", "did you mean 'adamw_torch'")),
        ("", ("--optim", "adamw_torh"), ("command line", "optim", "did you mean 'adamw_torch'")),
        ("bad_rows: skip\n", (), ("my.yaml", "bad_rows", "'skip'", "error, drop")),
        ("", ("--bad_rows", "skip"), ("command line", "bad_rows", "skip", "drop")),
        ("dtype: float13\n", (), ("my.yaml", "dtype", "float32")),
        ("datasets: a.csv\n", (), ("my.yaml", "datasets", "list")),
        ("datasets: [a.csv]\n", (), ("my.yaml", "datasets, entry 1", "`path`")),
        ("datasets:\n  - path: a.csv\n  - {path: b.csv, fractoin: 1}\n", (), ("datasets, entry 2", "did you mean 'fraction'")),
        ("datasets:\n  - {path: a.csv, fraction: half}\n", (), ("datasets, entry 1", "fraction", "float")),
        ("datasets: [{path: b.jsonl}]\ndataset_name: c.csv\n", (), ("my.yaml", "`dataset_name`", "`datasets`")),
        ("load_in_4bit: true\nload_in_8bit: true\nuse_peft: true\n", (), ("`load_in_4bit` and `load_in_8bit`",)),
        ("load_in_4bit: true\n", (), ("my.yaml", "use_peft: true")),
        ("load_in_4bit: true\nuse_peft: true\n", ("--use_peft", "false"), ("command line", "use_peft: true")),
        ("load_best_model_at_end: true\neval_strategy: epoch\nsave_strategy: steps\n", (), ("my.yaml", "strategy")),
        ("bf16: true\n", (), ("my.yaml", "bf16", "no GPU", "`bf16: false`")),
        ("per_device_train_batch_size: 0\n", (), ("my.yaml", "per_device_train_batch_size: 0", "1 or more")),
        ("learning_rate: -1.0\n", (), ("my.yaml", "learning_rate: -1.0", "above 0")),
        ("truncation_mode: keep_end\n", (), ("my.yaml", "truncation_mode", "max_length")),
        ("dataset_text_field: content\n", (), ("my.yaml", "dataset_text_field", "column_mapping: {content: text}")),
    ],
)
def test_errors_name_source_key_and_fix(tmp_path, text, argv, parts):
    message = message_of(tmp_path, text, *argv)
    assert all(part in message for part in parts), message


def test_error_of_a_dataclass_is_one_line(tmp_path):
    @dataclass
    class Picky:
        size: int = field(default=1)

        def __post_init__(self):
            if self.size < 0:
                raise ValueError("size: -1: must be\npositive")

    with pytest.raises(RecipeError, match=r"my\.yaml: line 1: size: -1: must be positive$"):
        parse(tmp_path, "size: -1\n", types=(Picky,))


def test_processes_without_a_group_are_rejected(tmp_path, monkeypatch):
    groups = parse(tmp_path, "dataset_name: d.jsonl\n")
    monkeypatch.setenv("WORLD_SIZE", "2")  # as launched on a machine without a GPU
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RecipeError, match=r"2 processes .* `use_cpu: true`"):
        check_process_group(groups)


# --- What the user sees ------------------------------------------------------------------------------------


def exit_status(recipe):
    with pytest.raises(SystemExit) as stop, exit_on_recipe_error():
        recipe()
    return stop.value.code


def test_recipe_exits_with_status_2_and_one_line(tmp_path):
    command = [sys.executable, RECIPE, "--lerning_rate", "1"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 2
    assert run.stderr.endswith("error: the command line: unknown option '--lerning_rate'; did you mean 'learning_rate'?\n")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(("argv", "source"), [((), "my.yaml"), (("--seed", "2"), "my.yaml and the command line")])
def test_later_errors_name_the_source_of_the_arguments(tmp_path, capsys, argv, source):
    def recipe():
        parse(tmp_path, "seed: 1\n", *argv)
        raise RecipeError("dataset_name: gone.csv: no such file")

    assert exit_status(recipe) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / source}: dataset_name: gone.csv: no such file\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0)


def test_ctrl_c_before_a_training(capsys):
    def recipe():
        raise KeyboardInterrupt

    assert (exit_status(recipe), capsys.readouterr().err) == (130, "stopped\n")


def test_ctrl_c_in_a_training_without_checkpoints(tmp_path, capsys):
    state, args = SimpleNamespace(global_step=3, max_steps=9), SimpleNamespace(output_dir=str(tmp_path))

    def recipe():
        parse(tmp_path, "seed: 1\n")
        set_trainer(SimpleNamespace(state=state, args=args))
        raise KeyboardInterrupt

    assert (exit_status(recipe), capsys.readouterr().err) == (130, "stopped after 3 of 9 steps\n")
