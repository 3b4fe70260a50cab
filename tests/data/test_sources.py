"""Files, folders, saved datasets, functions and Hub names: what is read from them, and what is rejected."""

import json

from support.data_files import failure, load, rows_of

import pytest
from datasets import Dataset, DatasetDict

ENDINGS = ["json", "jsonl", "csv", "parquet", "json.gz", "jsonl.gz", "csv.gz"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_file_type_gives_the_same_rows_and_names_a_bad_one(write, ending):
    rows = [{"prompt": "Q1", "completion": 'A, "1"\nand'}, {"prompt": "Q2", "completion": "NA"}]
    path = write([*rows, {"prompt": "Q3", "completion": ""}], f"data.{ending}")
    assert rows_of(path, "sft", bad_rows="drop") == rows
    assert f"{path}, row 3: empty completion" in failure(path, "sft")


def test_a_changed_file_is_read_again(write):
    for text in ("one", "two"):
        assert rows_of(write([{"text": text}], "data.csv.gz"), "sft") == [{"text": text}]


def test_digits_in_csv_are_text_and_extra_numbers_stay_numbers(write):
    path = write("prompt,level,reference\n007,3,1\n12,4,02\n", "data.csv")
    expected = [{"prompt": "007", "level": 3, "reference": "1"}, {"prompt": "12", "level": 4, "reference": "02"}]
    assert rows_of(path, "prompt") == expected


def test_texts_that_look_like_dates_stay_texts(write):
    path = write([{"prompt": f"When, {day}?", "completion": f"2024-01-0{day}"} for day in range(1, 6)])
    assert rows_of(path, "sft")[0]["completion"] == "2024-01-01"
    rows = rows_of(path, "sft", dataset_train_split="train[1:2]+train[-1:]")
    assert [row["completion"] for row in rows] == ["2024-01-02", "2024-01-05"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "\ufeffprompt,completion\na,b\n"),
        ("a.csv", "prompt,completion,\na,b,\n"),  # a column without a name, as of spreadsheets
        ("a.jsonl", '\ufeff\n{"prompt": "a", "completion": "b"}\n\n'),
        ("a.jsonl", '[{"prompt": "a", "completion": "b"}]'),
        ("a.json", '{"prompt": "a", "completion": "b"}\n'),
        ("data[1].json", '[{"prompt": "a", "completion": "b"}]'),
    ],
)
def test_usual_variants_of_files_are_read(write, name, content):
    assert rows_of(write(content, name), "sft") == [{"prompt": "a", "completion": "b"}]


def test_a_list_of_texts_is_text(write):
    assert rows_of(write(["a", "b"], "a.json"), "sft") == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text":\n{"text": "a"}\n', "line 3, column 9"),
        ("a.json", '[{"text": "a"},\n{"text" 1}]', "line 2, column 9"),
        ("a.jsonl.gz", "{", "line 1"),
        ("a.jsonl", 'null\n{"text": "a"}\n', "line 1: None"),
        ("a.json", '[{"text": "a"}, 3]', "row 2: 3"),
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", "\n", "no rows"),
        ("a.csv", "\n", "no rows"),
        ("a.csv", "text\n", "no rows"),
        ("a.csv", "prompt,completion\na,b\na;b\nc,d,e\n", "saw 3"),
        ("a.csv", "prompt,completion\na,b,c\nd,e,f\n", "saw 3"),
        ("a.csv", "prompt,completion,prompt\na,b,c\n", "prompt: two columns"),
        ("a.csv", "prompt;completion\na;b, c\n", "';'"),
        ("a.csv", "prompt\tcompletion\na\tb, c\n", r"'\t'"),
        ("a.parquet", "nonsense", "Parquet"),
        ("a.txt", "a", "name a file that ends in .json"),
    ],
)
def test_an_unreadable_file_is_one_message(write, name, content, message):
    path = write(content, name)
    error = failure(path, "sft")
    assert error.startswith(path)
    assert message in error


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet.gz", "none.jsonl.zst", "none"])
def test_a_missing_file_or_folder_is_one_message(tmp_path, monkeypatch, name):
    assert failure(tmp_path / name, "sft").startswith(f"{tmp_path / name}: there is no such file")
    monkeypatch.chdir(tmp_path)
    assert failure(f"./{name}", "sft").startswith(f"./{name}: there is no such file")


def test_compressed_parquet_is_one_message(write, tmp_path):
    path = write([{"text": "a"}], "corpus/a.parquet.gz")
    for source in (path, tmp_path / "corpus"):
        assert failure(source, "sft") == f"{path}: compressed Parquet cannot be read. Fix: decompress it with `gunzip`."


def test_files_in_another_encoding(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (tmp_path / "a.csv").write_bytes(b"text\ncaf\xe9\n")
    for name in ("a.jsonl", "a.csv"):
        assert "save it as UTF-8" in failure(tmp_path / name, "sft")
    (tmp_path / "fake.jsonl.gz").write_text("not gzip")
    assert "fake.jsonl.gz" in failure(tmp_path / "fake.jsonl.gz", "sft")


def test_a_file_has_one_split(write):
    path = write([{"text": "a"}, {"text": "b"}])
    assert rows_of(path, "sft", dataset_train_split="train[:1]") == [{"text": "a"}]
    assert "split: validation" in failure(path, "sft", dataset_train_split="validation")


@pytest.mark.parametrize("option", [{"dataset_arguments": {"rows": 1}}, {"dataset_config": "x"}])
def test_keys_that_a_file_does_not_read_are_rejected(write, option):
    assert next(iter(option)) in failure(write([{"text": "a"}]), "sft", **option)


# --- Folders, saved datasets, the Hub --------------------------------------------------------------------


def test_a_folder_of_splits_counts_rows_per_file(write, tmp_path):
    write([{"text": "a"}], "corpus/train-1.jsonl")
    write([{"text": "b"}, {"text": " "}], "corpus/train-2.jsonl")
    write([{"text": "c"}], "corpus/test.jsonl")
    data = load(tmp_path / "corpus", "sft", evaluate=True, bad_rows="drop")
    assert data.train["text"] == ["a", "b"]
    assert data.eval["text"] == ["c"]
    assert "train-2.jsonl, row 2: empty text" in failure(tmp_path / "corpus", "sft")


def test_a_folder_of_two_file_types_names_the_ignored_files(write, tmp_path, caplog):
    write([{"text": "a"}], "corpus/a.jsonl")
    write([{"text": "b"}], "corpus/b.csv")
    assert rows_of(tmp_path / "corpus", "sft") == [{"text": "a"}]
    assert "b.csv" in caplog.text


def test_an_empty_folder_is_rejected(tmp_path):
    assert failure(tmp_path, "sft").startswith(f"{tmp_path}: no data")


def test_saved_datasets(tmp_path):
    split = Dataset.from_dict({"text": ["a"]})
    split.save_to_disk(tmp_path / "one")
    DatasetDict({"train": split, "valid": split}).save_to_disk(tmp_path / "two")
    assert rows_of(tmp_path / "one", "sft") == [{"text": "a"}]
    assert load(tmp_path / "two", "sft", evaluate=True, dataset_test_split="valid").eval["text"] == ["a"]
    assert "split: fit: unknown. Fix: set one of train, valid" in failure(tmp_path / "two", "sft", dataset_train_split="fit")


def test_a_hub_name_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = failure("nobody/nothing", "sft")
    assert message.startswith("nobody/nothing: not a local file")
    assert "HF_HUB_OFFLINE" in message
    assert "`hf download --repo-type dataset nobody/nothing --local-dir FOLDER`" in message


# --- Functions -------------------------------------------------------------------------------------------

MODULE = """
from datasets import Dataset

def rows(split, count=1):
    if split == "dev":
        raise ValueError("no dev here")
    return Dataset.from_dict({"text": [f"{split} {n}" for n in range(count)]})

def as_list(split):
    return [split]

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "made_up_rows.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "made_up_rows"


def test_a_function_is_called_with_split_and_arguments(module):
    data = load(f"{module}.rows", "sft", evaluate=True, dataset_arguments={"count": 2})
    assert data.train["text"] == ["train 0", "train 1"]
    assert data.eval["text"] == ["test 0", "test 1"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("made_up_rows.rows", {"dataset_arguments": {"size": 2}}, "unexpected keyword argument 'size'"),
        ("made_up_rows.rows", {"dataset_train_split": "dev"}, "no dev here"),
        ("made_up_rows.as_list", {}, "returned a list"),
        ("made_up_rows.number", {}, "not callable"),
        ("made_up_rows.none", {}, "made_up_rows has no 'none'"),
        ("no_such_module.rows", {}, "neither a file"),
    ],
)
def test_an_unusable_function_is_one_message(module, name, options, message):
    error = failure(name, "sft", **options)
    assert error.startswith(name)
    assert message in error


# --- Columns ---------------------------------------------------------------------------------------------


def test_columns_are_renamed(write):
    path = write([{"question": "Q", "best": "A"}], "data.csv")
    mapping = {"question": "prompt", "best": "completion"}
    assert rows_of(path, "sft", column_mapping=mapping) == [{"prompt": "Q", "completion": "A"}]
    assert "two columns would be `best`" in failure(path, "sft", column_mapping={"question": "best"})


def test_an_unknown_column_is_named_with_those_that_exist(write):
    message = failure(write([{"question": "Q", "best": "A"}]), "sft", column_mapping={"qestion": "prompt"})
    assert "column_mapping: qestion" in message
    assert "question, best" in message
    assert "did you mean 'question'?" in message


def test_text_columns_of_csv_are_text_under_their_own_names(write):
    path = write("question,answer\n007,012\n", "data.csv")
    mapping = {"question": "prompt", "answer": "completion"}
    assert rows_of(path, "sft", column_mapping=mapping) == [{"prompt": "007", "completion": "012"}]


def test_the_report_is_json(write):
    pair = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    report = load(write([pair | {"id": 1}, pair | {"id": 2, "prompt": "Q2"}]), "preference", test_split_size=0.5).report
    assert json.loads(json.dumps(report)) == report
    assert report["train"]["sources"][0]["unused_columns"] == ["id"]
