"""The strict parser: what it accepts, and that everything else gets one message with file, key and remedy."""

import subprocess
import sys
from dataclasses import dataclass, field

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.config import parser
from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.config.evaluate import EvaluateArguments
from rlhf_recipes.config.parser import parse_dataclasses
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.rewards.reward_funcs import load_rewards
from support import ROOT

import pytest
from trl import ModelConfig, SFTConfig

RECIPE = ROOT / "recipes" / "sft.py"


def parse(tmp_path, text, *argv, types=(DataArguments, SFTConfig, ModelConfig)):
    config = tmp_path / "my.yaml"
    config.write_text(text)
    return parse_dataclasses(RECIPE, *types, argv=["--config", str(config), *argv])


def refusal(tmp_path, text, *argv) -> str:
    with pytest.raises(RecipeError) as error:
        parse(tmp_path, text, *argv)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_file_fills_the_dataclasses_and_the_command_line_overrides_it(tmp_path):
    data, training, model = parse(
        tmp_path,
        "dataset_name: d.jsonl\nlearning_rate: 1e-3\nseed: 3\nlora_r: 8\n",
        *("--seed", "7", "--use_peft", "--dtype=float32"),
    )
    assert (data.dataset_name, training.learning_rate, training.seed) == ("d.jsonl", 1e-3, 7)
    assert (model.lora_r, model.use_peft, model.dtype) == (8, True, "float32")


def test_without_config_the_tiny_one_of_the_recipe_is_read():
    data, training, _ = parse_dataclasses(RECIPE, DataArguments, SFTConfig, ModelConfig, argv=[])
    assert data.dataset_name == "rlhf_recipes.tiny.splits.demonstrations"
    assert training.output_dir == "runs/tiny/sft"


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_every_way_to_write_a_number_is_a_number(tmp_path, number):
    assert parse(tmp_path, f"learning_rate: {number}\n")[1].learning_rate == 1e-4


def test_null_is_a_value_where_the_type_allows_it(tmp_path):
    assert parse(tmp_path, "max_length: null\n")[1].max_length is None
    assert parse(tmp_path, "", "--max_length", "none")[1].max_length is None


def test_mixtures_are_read_entry_by_entry(tmp_path):
    entries = "  - path: a.csv\n    fraction: 0.5\n  - {path: b.csv, column_mapping: {q: prompt}}\n"
    data, *_ = parse(tmp_path, "datasets:\n" + entries)
    assert [source.path for source in data.datasets] == ["a.csv", "b.csv"]
    assert (data.datasets[0].fraction, data.datasets[1].column_mapping) == (0.5, {"q": "prompt"})
    data, *_ = parse(tmp_path, "", "--datasets", "a.csv", "b.csv")
    assert [source.path for source in data.datasets] == ["a.csv", "b.csv"]


def test_mappings_are_json_on_the_command_line(tmp_path):
    data, *_ = parse(tmp_path, "", "--dataset_arguments", '{"rows": 5}')
    assert data.dataset_arguments == {"rows": 5}
    assert "JSON mapping" in refusal(tmp_path, "", "--dataset_arguments", "rows=5")


@pytest.mark.parametrize(
    ("text", "argv", "parts"),
    [
        ("learning_rat: 1e-4\n", (), ("my.yaml", "'learning_rat'", "did you mean 'learning_rate'")),
        ("", ("--learning_rat", "1"), ("command line", "--learning_rat", "did you mean 'learning_rate'")),
        ("", ("--learning_rat=1",), ("command line", "did you mean 'learning_rate'")),
        ("", ("--seed", "1", "stray"), ("command line", "'stray'", "--key value")),
        ("seed: one\n", (), ("my.yaml", "seed", "int", "'one'")),
        ("seed: 1.5\n", (), ("my.yaml", "seed", "int", "1.5")),
        ("seed: true\n", (), ("my.yaml", "seed", "int", "True")),
        ("learning_rate: fast\n", (), ("my.yaml", "learning_rate", "float", "'fast'")),
        ("", ("--learning_rate", "fast"), ("command line", "learning_rate", "float", "'fast'")),
        ("use_peft: maybe\n", (), ("my.yaml", "use_peft", "bool", "'maybe'")),
        ("dataset_name: 3\n", (), ("my.yaml", "dataset_name", "str", "3")),
        ("dataset_name: [a, b]\n", (), ("my.yaml", "dataset_name", "str")),
        ("seed:\n", (), ("my.yaml", "seed", "int", "None")),
        ("optim: adamw_torh\n", (), ("my.yaml", "optim", "did you mean 'adamw_torch'")),
        ("", ("--optim", "adamw_torh"), ("command line", "optim", "did you mean 'adamw_torch'")),
        ("eval_strategy: no\n", (), ("my.yaml", "eval_strategy", "in quotes")),
        ("bad_rows: skip\n", (), ("my.yaml", "bad_rows", "'skip'", "error, drop")),
        ("", ("--bad_rows", "skip"), ("command line", "bad_rows", "skip", "drop")),
        ("dtype: float13\n", (), ("my.yaml", "dtype", "float32")),
        ("datasets: a.csv\n", (), ("my.yaml", "datasets", "list")),
        ("datasets: [a.csv]\n", (), ("my.yaml", "datasets, entry 1", "`path`")),
        ("datasets:\n  - path: a.csv\n  - {path: b.csv, fractoin: 1}\n", (), ("datasets, entry 2", "did you mean 'fraction'")),
        ("datasets:\n  - {path: a.csv, fraction: half}\n", (), ("datasets, entry 1", "fraction", "float")),
        ("load_in_4bit: true\nload_in_8bit: true\nuse_peft: true\n", (), ("`load_in_4bit` and `load_in_8bit`",)),
        ("load_in_4bit: true\n", (), ("my.yaml", "use_peft: true")),
        ("load_in_4bit: true\nuse_peft: true\n", ("--use_peft", "false"), ("command line", "use_peft: true")),
        ("fp16: true\n", ("--bf16", "true"), ("`bf16` and `fp16`",)),
        ("load_best_model_at_end: true\neval_strategy: epoch\nsave_strategy: steps\n", (), ("my.yaml", "strategy")),
        ("seed: 1\nseed: 2\n", (), ("my.yaml", "line 2", "'seed' stands twice")),
        ("seed: [1\n", (), ("my.yaml", "not valid YAML", "line")),
        ("bf16: true\n", (), ("my.yaml", "bf16", "no GPU", "`bf16: false`")),
        ("learning_rate: .nan\n", (), ("my.yaml", "learning_rate", "nan")),
        ("learning_rate: .inf\n", (), ("my.yaml", "learning_rate", "inf")),
        ("seed: '3x'\n", (), ("my.yaml", "seed", "'3x' (str)")),
        ("per_device_train_batch_size: 0\n", (), ("my.yaml", "per_device_train_batch_size", "1 or more")),
        ("eval_on_start: true\n", (), ("my.yaml", "eval_on_start", "eval_strategy")),
        ("truncation_mode: keep_end\n", (), ("my.yaml", "truncation_mode", "max_length")),
        ("dataset_text_field: content\n", (), ("my.yaml", "dataset_text_field", "column_mapping: {content: text}")),
    ],
)
def test_refusals_name_file_key_and_remedy(tmp_path, text, argv, parts):
    message = refusal(tmp_path, text, *argv)
    assert all(part in message for part in parts), message


def test_none_on_the_command_line_unsets(tmp_path):
    data, *_ = parse(tmp_path, "dataset_name: a.csv\n", "--dataset_name", "none", "--datasets", "b.csv")
    assert data.dataset_name is None


def test_anchors_and_merge_keys_of_yaml(tmp_path):
    text = "datasets:\n  - &one {path: a.csv, split: x}\n  - {<<: *one, path: b.csv}\n"
    assert [(s.path, s.split) for s in parse(tmp_path, text)[0].datasets] == [("a.csv", "x"), ("b.csv", "x")]


def test_precision_follows_the_machine(tmp_path):
    assert parse(tmp_path, "")[1].bf16 is False
    assert parse(tmp_path, "use_cpu: true\n")[1].bf16 is False
    assert parse(tmp_path, "use_cpu: true\nbf16: true\n")[1].bf16 is True


def test_later_errors_name_the_file_too(tmp_path, capsys):
    def later():
        parse(tmp_path, "seed: 1\n")
        raise RecipeError("dataset_name: gone.csv: no such file")

    with pytest.raises(SystemExit) as stop, exit_on_recipe_error():
        later()
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'my.yaml'} and the command line: dataset_name: gone.csv: no such file\n".replace(
            " and the command line", ""
        )
    )


def test_abbreviated_options_are_refused(tmp_path):
    assert "unknown option '--learning'" in refusal(tmp_path, "", "--learning", "1")


def test_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    with pytest.raises(RecipeError, match=r"mien\.yaml: no such file; did you mean '.*mine\.yaml'"):
        read_yaml(tmp_path / "mien.yaml")


@pytest.mark.parametrize(
    ("content", "expected"), [(b"- a\n- b\n", "list"), (b"just words", "str"), (b"\xff\xfe\x00", "cannot be read")]
)
def test_files_that_hold_no_mapping(tmp_path, content, expected):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=expected):
        read_yaml(path)


def test_empty_file_means_defaults(tmp_path):
    (tmp_path / "x.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "x.yaml") == {}


def test_value_that_a_dataclass_itself_refuses_is_one_message(tmp_path):
    @dataclass
    class Picky:
        size: int = field(default=1)

        def __post_init__(self):
            if self.size < 0:
                raise ValueError("size must be\npositive")

    (tmp_path / "my.yaml").write_text("size: -1\n")
    with pytest.raises(RecipeError, match=r"my\.yaml: size must be positive"):
        parse_dataclasses(RECIPE, Picky, argv=["--config", str(tmp_path / "my.yaml")])


def test_recipe_exits_with_status_2_and_one_line(tmp_path):
    command = [sys.executable, RECIPE, "--lerning_rate", "1"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 2
    assert run.stderr.endswith("error: the command line: unknown option '--lerning_rate'; did you mean 'learning_rate'?\n")
    assert "Traceback" not in run.stderr


def test_mappings_in_lists_are_written_as_json_on_the_command_line(tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("policies: {base: null}\n")
    types = (EvaluateArguments, DataArguments)
    spec, data = '{"path": "a.b", "name": "one"}', '[{"path": "c.jsonl"}, {"path": "d.jsonl", "split": "test"}]'
    argv = ["--config", str(config), "--rewards", spec, "e.f", "--eval_datasets", data]
    evaluation, sources = parse_dataclasses(tmp_path / "evaluate.py", *types, argv=argv)
    assert evaluation.rewards == [{"path": "a.b", "name": "one"}, "e.f"]
    assert [(source.path, source.split) for source in sources.eval_datasets] == [("c.jsonl", "train"), ("d.jsonl", "test")]


def test_data_on_the_command_line_are_in_place_of_those_of_the_file(tmp_path):
    text = "dataset_name: a.function\ndataset_arguments: {rows: 3}\neval_datasets: [{path: b.jsonl}]\n"
    data, *_ = parse(tmp_path, text, "--datasets", '{"path": "c.csv"}', "--test_split_size", "0.5")
    assert (data.dataset_name, data.dataset_arguments, [source.path for source in data.datasets]) == (None, None, ["c.csv"])
    assert (data.eval_datasets, data.test_split_size) == ([], 0.5)
    text = "datasets: [{path: b.jsonl}]\ntest_split_size: 3\n"
    data, *_ = parse(tmp_path, text, "--dataset_name", "c.csv", "--eval_datasets", "d.csv")
    assert (data.dataset_name, data.datasets, data.test_split_size) == ("c.csv", [], None)
    text = "dataset_name: a.function\ndataset_arguments: {rows: 3}\ncolumn_mapping: {q: prompt}\n"
    data, *_ = parse(tmp_path, text, "--dataset_name", "c.csv")
    assert (data.dataset_name, data.dataset_arguments, data.column_mapping) == ("c.csv", None, {"q": "prompt"})
    data, *_ = parse(tmp_path, text, "--dataset_name", "a.function")
    assert data.dataset_arguments == {"rows": 3}
    message = refusal(tmp_path, "datasets: [{path: b.jsonl}]\ndataset_name: c.csv\n")
    assert "my.yaml: Set either `dataset_name` or `datasets`: both are set" in message


def test_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch):
    _, training, _ = parse(tmp_path, "dataset_name: d.jsonl\n")
    monkeypatch.setenv("WORLD_SIZE", "2")  # as launched on a machine without a GPU
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RecipeError, match=r"my\.yaml: 2 processes were launched, and there is no GPU .* set `use_cpu: true`"):
        parser._refuse_each_alone([training], "my.yaml")


def test_a_ctrl_c_before_any_training_is_one_line(capsys):
    with pytest.raises(SystemExit) as status, exit_on_recipe_error():
        raise KeyboardInterrupt
    assert (status.value.code, capsys.readouterr().err) == (130, "stopped\n")


def test_dotted_paths_are_looked_for_where_a_recipe_is_launched(tmp_path, monkeypatch):
    (tmp_path / "rewards_nearby.py").write_text("def short(completions, **columns):\n    return [0.0 for _ in completions]\n")
    (tmp_path / "x.yaml").write_text("policies: {base: null}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    parse_dataclasses(tmp_path / "evaluate.py", EvaluateArguments, argv=["--config", "x.yaml"])
    (reward,), _ = load_rewards(["rewards_nearby.short"])
    assert reward(prompts=["a"], completions=["b"]) == [0.0]
