"""What `rlhf_recipes.data` accepts, makes of it, and says when it cannot."""

import gzip
import json

from rlhf_recipes.config.data import DataArguments, DatasetSource
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.data import check_lengths, load_data, rows
from support import SHARED

import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

REAL = SHARED / "data"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real data are not here")

disable_progress_bars()


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    """Write rows (or raw text) to a file of the ending that the name has; returns its path."""

    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = path.with_name(path.name.removesuffix(".gz"))
        if isinstance(rows, str):
            plain.write_text(rows, encoding="utf-8")
        elif plain.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(plain)
        elif plain.suffix == ".csv":
            Dataset.from_list(rows).to_csv(plain)
        elif plain.suffix == ".json":
            plain.write_text(json.dumps(rows), encoding="utf-8")
        else:
            plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if path != plain:
            path.write_bytes(gzip.compress(plain.read_bytes()))
            plain.unlink()
        return str(path)

    return write


def load(path, kind, evaluate=False, seed=0, **arguments):
    return load_data(DataArguments(dataset_name=path, **arguments), kind, evaluate=evaluate, seed=seed)


def rows_of(path, kind, **arguments):
    return load(path, kind, **arguments).train.to_list()


def failure(path, kind, **arguments):
    with pytest.raises(RecipeError) as caught:
        load(path, kind, **arguments)
    return str(caught.value)


# --- Files -----------------------------------------------------------------------------------------------

ENDINGS = ["json", "jsonl", "csv", "parquet", "json.gz", "jsonl.gz", "csv.gz", "parquet.gz"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_file_type_gives_the_same_rows(write, ending):
    rows = [{"prompt": "Q1", "completion": 'A, "1"\nand'}, {"prompt": "Q2", "completion": "NA"}]
    assert rows_of(write(rows, f"data.{ending}"), "sft") == rows


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_file_type_names_a_bad_row(write, ending):
    path = write([{"prompt": "Q1", "completion": "A"}, {"prompt": "Q2", "completion": ""}], f"data.{ending}")
    assert f"{path}, row 2: empty completion" in failure(path, "sft")


def test_a_changed_file_is_read_again(write):
    for text in ("one", "two"):
        assert rows_of(write([{"text": text}], "data.csv.gz"), "sft") == [{"text": text}]


def test_digits_in_csv_are_text_and_extra_numbers_stay_numbers(write):
    path = write("prompt,level\n007,3\n12,4\n", "data.csv")
    assert rows_of(path, "prompt") == [{"prompt": "007", "level": 3}, {"prompt": "12", "level": 4}]


def test_brackets_in_a_file_name(write):
    assert rows_of(write([{"text": "a"}], "data[1].jsonl"), "sft") == [{"text": "a"}]


def test_a_directory_of_splits_counts_rows_per_file(write, tmp_path):
    write([{"text": "a"}], "corpus/train-1.jsonl")
    write([{"text": "b"}, {"text": " "}], "corpus/train-2.jsonl")
    write([{"text": "c"}], "corpus/test.jsonl")
    data = load(str(tmp_path / "corpus"), "sft", evaluate=True, bad_rows="drop")
    assert data.train["text"] == ["a", "b"]
    assert data.eval["text"] == ["c"]
    assert "train-2.jsonl, row 2: empty text" in failure(str(tmp_path / "corpus"), "sft")


def test_a_directory_of_two_file_types_says_what_it_ignores(write, tmp_path, caplog):
    write([{"text": "a"}], "corpus/a.jsonl")
    write([{"text": "b"}], "corpus/b.csv")
    assert rows_of(str(tmp_path / "corpus"), "sft") == [{"text": "a"}]
    assert "b.csv" in caplog.text


def test_saved_datasets(tmp_path):
    split = Dataset.from_dict({"text": ["a"]})
    split.save_to_disk(tmp_path / "one")
    DatasetDict({"train": split, "valid": split}).save_to_disk(tmp_path / "two")
    assert rows_of(str(tmp_path / "one"), "sft") == [{"text": "a"}]
    assert load(str(tmp_path / "two"), "sft", evaluate=True, dataset_test_split="valid").eval["text"] == ["a"]
    assert "it has: train, valid" in failure(str(tmp_path / "two"), "sft", dataset_train_split="fit")


def test_a_slice_of_a_file(write):
    assert rows_of(write([{"text": "a"}, {"text": "b"}]), "sft", dataset_train_split="train[:1]") == [{"text": "a"}]


def test_files_that_cannot_be_read(write, tmp_path):
    good = json.dumps({"text": "a"})
    assert "line 3 is not valid JSON" in failure(write(f'{good}\n\n{{"text":\n{good}\n', "bad.jsonl"), "sft")
    assert "line 2 is not valid JSON" in failure(write(f'[{good},\n{{"text" 1}}]', "bad.json"), "sft")
    assert "line 1 is not valid JSON" in failure(write("{", "bad.jsonl.gz"), "sft")
    assert "is empty" in failure(write("", "empty.jsonl"), "sft")
    assert "no rows" in failure(write("\n", "blank.jsonl"), "sft")
    assert "no rows" in failure(write("text\n", "head.csv"), "sft")
    assert "cannot be read" in failure(write("nonsense", "bad.parquet"), "sft")
    assert "Cells are separated by commas" in failure(write("prompt,completion\na,b\na;b\nc,d,e\n", "cells.csv"), "sft")
    (tmp_path / "fake.jsonl.gz").write_text("not gzip")
    assert "fake.jsonl.gz: it cannot be read" in failure(str(tmp_path / "fake.jsonl.gz"), "sft")
    missing = failure(str(tmp_path / "none.jsonl"), "sft")
    assert "none.jsonl: there is no such file" in missing
    assert "no data could be read" in failure(str(tmp_path), "sft", dataset_config=None)


def test_a_hub_name_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = failure("nobody/nothing", "sft")
    assert "nobody/nothing is not a local file" in message
    assert "the Hub could not be reached (HF_HUB_OFFLINE is set)" in message
    assert "`hf download --repo-type dataset nobody/nothing --local-dir FOLDER`" in message


# --- Functions -------------------------------------------------------------------------------------------

MODULE = """
from datasets import Dataset

def rows(split, count=1):
    if split == "dev":
        raise ValueError("no dev here")
    return Dataset.from_dict({"text": [f"{split} {n}" for n in range(count)]})

def listed(split):
    return [split]

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "made_up_rows.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "made_up_rows"


def test_a_function_is_called_with_its_arguments(module):
    data = load(f"{module}.rows", "sft", evaluate=True, dataset_arguments={"count": 2})
    assert data.train["text"] == ["train 0", "train 1"]
    assert data.eval["text"] == ["test 0", "test 1"]


def test_functions_that_cannot_be_used(module):
    assert "unexpected keyword argument 'size'" in failure(f"{module}.rows", "sft", dataset_arguments={"size": 2})
    assert "no dev here" in failure(f"{module}.rows", "sft", dataset_train_split="dev")
    assert "returned list" in failure(f"{module}.listed", "sft")
    assert "not a function" in failure(f"{module}.number", "sft")
    assert "no attribute 'none'" in failure(f"{module}.none", "sft")
    assert "neither a file" in failure("no_such_module.rows", "sft")


# --- Shapes ----------------------------------------------------------------------------------------------

TALK = [user("Hi"), bot("Hello"), user("Why?")]
PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
TALK_PAIR = {"prompt": TALK, "chosen": [bot("So")], "rejected": [bot("No")]}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: So",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: No",
}
IMPLICIT = {"chosen": [*TALK, bot("So")], "rejected": [*TALK, bot("No")]}
RANKING = {"prompt": "Q", "completions": ["c", "a", "b", "a2"], "ranks": [2, 0, 1, 0]}
PAIRS = [("a", "c"), ("b", "c"), ("a2", "c"), ("a", "b"), ("a2", "b")]
RESPONSES = {"prompt": [user("Q")], "responses": [{"text": "worse", "rank": 1}, {"text": "best", "rank": 0}]}
INSTRUCTION = {"instruction": "Add", "input": "1 2", "output": "3"}
ADD = [user("Add\n1 2")]
MESSAGES = {"messages": [{"role": "system", "content": ""}, *TALK, bot("So")]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        ({"text": "a"}, "sft", [{"text": "a"}]),
        (MESSAGES, "sft", [MESSAGES]),
        (SHAREGPT, "sft", [{"messages": TALK[:2]}]),
        ({"prompt": "Q", "completion": "A", "id": 1}, "sft", [{"prompt": "Q", "completion": "A"}]),
        ({"prompt": TALK, "completion": "A"}, "sft", [{"prompt": TALK, "completion": [bot("A")]}]),
        (INSTRUCTION, "sft", [{"prompt": ADD, "completion": [bot("3")]}]),
        (INSTRUCTION | {"input": ""}, "sft", [{"prompt": [user("Add")], "completion": [bot("3")]}]),
        (PAIR, "sft", [{"prompt": "Q", "completion": "good"}]),
        (HH, "sft", [{"prompt": TALK, "completion": [bot("So")]}]),
        (RANKING, "sft", [{"prompt": "Q", "completion": "a"}]),
        (PAIR, "preference", [PAIR]),
        (PAIR | {"margin": 2}, "preference", [PAIR | {"margin": 2.0}]),
        (TALK_PAIR, "preference", [TALK_PAIR]),
        (TALK_PAIR | {"chosen": "So", "rejected": "No"}, "preference", [TALK_PAIR]),
        (HH, "preference", [TALK_PAIR]),
        ({side: text.lstrip() for side, text in HH.items()}, "preference", [TALK_PAIR]),
        (IMPLICIT, "preference", [TALK_PAIR]),
        (IMPLICIT | {"prompt": "Hi"}, "preference", [TALK_PAIR]),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            "preference",
            [{"prompt": "The sky is", "chosen": " blue.", "rejected": " black."}],
        ),
        (
            {"chosen": "Q: yes\nA: so", "rejected": "Q: yes\nA: not"},
            "preference",
            [{"prompt": "Q: yes\nA:", "chosen": " so", "rejected": " not"}],
        ),
        (
            INSTRUCTION | {"chosen": "3", "rejected": "4"},
            "preference",
            [{"prompt": ADD, "chosen": [bot("3")], "rejected": [bot("4")]}],
        ),
        (RANKING, "preference", [{"prompt": "Q", "chosen": better, "rejected": worse} for better, worse in PAIRS]),
        (RANKING, "ranking", [RANKING]),
        (
            RESPONSES,
            "ranking",
            [{"prompt": [user("Q")], "completions": [[bot("worse")], [bot("best")]], "ranks": [1, 0]}],
        ),
        (PAIR, "ranking", [{"prompt": "Q", "completions": ["good", "bad"], "ranks": [0, 1]}]),
        ({"prompt": "Q", "answer": {"a": [1]}}, "prompt", [{"prompt": "Q", "answer": {"a": [1]}}]),
        ({"prompt": TALK}, "prompt", [{"prompt": TALK}]),
        ({"instruction": "Add", "input": "1", "id": 7}, "prompt", [{"prompt": [user("Add\n1")], "id": 7}]),
        ({"prompt": "Q", "completion": " A", "id": 1}, "prompt", [{"prompt": "Q", "reference": "A", "id": 1}]),
        ({"prompt": "Q", "messages": TALK}, "prompt", [{"prompt": "Q", "messages": TALK}]),
        (INSTRUCTION, "prompt", [{"prompt": ADD, "reference": "3"}]),
        (MESSAGES | {"id": 1}, "prompt", [{"prompt": MESSAGES["messages"][:-1], "reference": "So", "id": 1}]),
        (PAIR | {"id": 1, "margin": 1}, "prompt", [{"prompt": "Q", "id": 1}]),
        (HH, "prompt", [{"prompt": TALK}]),
        (RESPONSES | {"id": 1}, "prompt", [{"prompt": [user("Q")], "id": 1}]),
    ],
)
def test_shapes(write, row, kind, expected):
    assert rows_of(write([row]), kind) == expected


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"prompt": "Q"}, "sft", "prompt + completion"),
        ({"text": "a"}, "preference", "chosen + rejected"),
        (MESSAGES, "ranking", "prompt + responses"),
        ({"text": "a"}, "prompt", "column_mapping: {text: prompt}"),
    ],
)
def test_a_shape_that_a_stage_cannot_use_says_what_it_can(write, row, kind, words):
    message = failure(write([row]), kind)
    assert words in message
    assert f"the columns are {', '.join(row)}" in message


# --- Bad rows --------------------------------------------------------------------------------------------

BAD = [
    (PAIR | {"prompt": " "}, "preference", "empty prompt"),
    (PAIR | {"prompt": None}, "prompt", "empty prompt"),
    (INSTRUCTION | {"instruction": ""}, "sft", "empty prompt"),
    (PAIR | {"rejected": "\n"}, "preference", "empty completion"),
    ({"prompt": "Q", "completion": None}, "sft", "empty completion"),
    ({"text": "\t"}, "sft", "empty text"),
    (PAIR | {"rejected": " good"}, "preference", "chosen equal to rejected"),
    ({"chosen": "a b", "rejected": "a b"}, "preference", "chosen equal to rejected"),
    ({"chosen": "a b", "rejected": "c b"}, "preference", "chosen and rejected without a common prompt"),
    (IMPLICIT | {"rejected": IMPLICIT["chosen"]}, "preference", "chosen equal to rejected"),
    ({"messages": [user("a"), user("b"), bot("c")]}, "sft", "two turns of one role in a row"),
    ({"prompt": [user("a"), bot("b")], "completion": [bot("c")]}, "sft", "two turns of one role in a row"),
    ({"prompt": [user("a"), bot("b")], "completion": [user("c"), bot("d")]}, "sft", "does not end with a user turn"),
    ({"prompt": [user("a")], "completion": [bot("b"), user("c"), bot("d")]}, "sft", "turns that are not the assistant's"),
    ({"messages": [user("a"), bot(" "), user("b"), bot("c")]}, "sft", "empty turn"),
    ({"messages": [user("a"), bot("b"), user("c")]}, "sft", "do not end with an assistant turn"),
    ({"messages": [user("a"), {"role": "narrator", "content": "b"}, bot("c")]}, "sft", "unknown role 'narrator'"),
    ({"messages": [user("a"), {"role": "bot", "content": "b"}]}, "sft", "unknown role 'bot' (known are system, user"),
    ({"messages": [user("a"), {"role": "system", "content": "b"}, bot("c")]}, "sft", "a system turn that is not first"),
    ({"messages": [user("a"), bot("b") | {"tool_calls": [{"name": "f"}]}]}, "sft", "tool calls"),
    ({"messages": "a"}, "sft", "do not end with an assistant turn"),
    ({"prompt": [{"role": "system", "content": "a"}]}, "prompt", "a prompt without a user turn"),
    ({"messages": [user("a")]}, "prompt", "messages without an assistant turn"),
    (HH | {"rejected": HH["rejected"] + "\n\nHuman: Oh"}, "preference", "does not end with an Assistant turn"),
    (HH | {"rejected": "No"}, "preference", "not a transcript"),
    (HH | {"rejected": HH["rejected"] + "\n\nAssistant: Oh"}, "preference", "two turns of one role in a row"),
    (RANKING | {"ranks": [0, 1]}, "ranking", "ranks of other length than completions"),
    (RANKING | {"completions": ["a"], "ranks": [0]}, "ranking", "fewer than two completions"),
    (RANKING | {"ranks": [1, 1, 1, 1]}, "preference", "all completions tie"),
    (RANKING | {"ranks": [0, 1, float("nan"), 2]}, "ranking", "rank is not a finite number"),
    (RANKING | {"completions": ["a", "a", "b", "c"]}, "preference", "equal completions of different rank"),
    (RESPONSES | {"responses": [{"text": "a", "rank": 0}, {"text": "", "rank": 1}]}, "ranking", "empty completion"),
    (PAIR | {"margin": None}, "preference", "margin is not a finite number"),
    ({"prompt": 3}, "prompt", "prompt is not text"),
    (PAIR | {"chosen": 3}, "preference", "chosen is not text"),
    (TALK_PAIR | {"chosen": 3}, "preference", "chosen is neither text nor a list of messages"),
    ({"messages": [{"role": "user", "content": 1}, bot("c")]}, "sft", "a message that is not text"),
]
GOOD = {
    "text": {"text": "fine"},
    "messages": {"messages": TALK[:2]},
    "instruction": INSTRUCTION,
    "completion": {"prompt": "Q", "completion": "A"},
}


def good_row_like(row):
    """A usable row with the same columns and the same form as `row`."""
    for key in ("text", "messages", "instruction"):
        if key in row:
            return GOOD[key]
    if "responses" in row:
        return RESPONSES
    if "ranks" in row:
        return RANKING
    if "chosen" in row and "prompt" in row:
        return (TALK_PAIR if isinstance(row["prompt"], list) else PAIR) | ({"margin": 1.5} if "margin" in row else {})
    if "chosen" in row:
        texts = {"chosen": "a b", "rejected": "a c"}
        return IMPLICIT if isinstance(row["chosen"], list) else HH if "Human" in row["chosen"] else texts
    good = {"prompt": TALK if isinstance(row["prompt"], list) else "Q"}
    return good | ({"completion": [bot("A")] if isinstance(row["completion"], list) else "A"} if "completion" in row else {})


@pytest.mark.parametrize(("row", "kind", "reason"), BAD)
def test_bad_rows_stop_with_file_and_row_or_are_dropped_and_counted(write, caplog, row, kind, reason):
    good = good_row_like(row)
    path = write([good, row, good])
    message = failure(path, kind)
    assert f"{path}, row 2: " in message
    assert reason in message
    assert "1 of 3 rows" in message
    assert "`bad_rows: drop`" in message

    caplog.clear()
    data = load(path, kind, bad_rows="drop")
    ((counted, count),) = data.report["train"]["dropped"].items()
    assert reason in counted
    assert count == 1
    assert data.train.to_list() == rows_of(write([good, good], "good.jsonl"), kind)
    assert f"Dropped 1 of 3 rows of the train data (1 {counted}): {path}, row 2: {counted}" in caplog.text


def test_several_reasons_are_counted_and_the_first_rows_named(write):
    rows = [{"prompt": "", "completion": "A"}] * 4 + [{"prompt": "Q", "completion": ""}] * 2 + [GOOD["completion"]]
    message = failure(write(rows), "sft")
    assert "6 of 7 rows of the train data (4 empty prompt, 2 empty completion)" in message
    assert "row 3" in message
    assert "row 4" not in message


def test_no_rows_left_is_always_an_error(write):
    assert "No rows are left" in failure(write([{"text": ""}]), "sft", bad_rows="drop")


def test_tools_may_speak_between_assistant_turns(write):
    row = {"messages": [user("a"), bot("look"), {"role": "tool", "content": "b"}, {"role": "tool", "content": "c"}, bot("d")]}
    assert rows_of(write([row]), "sft") == [row]


def test_a_dropped_side_does_not_matter_to_a_stage_that_does_not_read_it(write):
    assert rows_of(write([PAIR | {"rejected": "good"}]), "sft") == [{"prompt": "Q", "completion": "good"}]


# --- Columns, mixtures, splits ---------------------------------------------------------------------------


def test_column_mapping(write):
    path = write([{"question": "Q", "best": "A"}], "data.csv")
    mapping = {"question": "prompt", "best": "completion"}
    assert rows_of(path, "sft", column_mapping=mapping) == [{"prompt": "Q", "completion": "A"}]
    message = failure(path, "sft", column_mapping={"qestion": "prompt"})
    assert "`qestion`" in message
    assert "question, best" in message
    assert "did you mean 'question'?" in message
    assert "name two columns `best`" in failure(path, "sft", column_mapping={"question": "best"})


def mixture(kind, *sources, **arguments):
    return load_data(DataArguments(datasets=list(sources), **arguments), kind, evaluate=False, seed=0)


def test_a_mixture_keeps_the_columns_that_all_have(write, caplog):
    first = DatasetSource(write([PAIR | {"margin": 1}], "a.jsonl"))
    second = DatasetSource(write([{"q": "Q2", "chosen": "x", "rejected": "y"}], "b.jsonl"), column_mapping={"q": "prompt"})
    data = mixture("preference", first, second)
    assert data.train.to_list() == [PAIR, {"prompt": "Q2", "chosen": "x", "rejected": "y"}]
    assert "margins" in caplog.text


def test_a_mixture_of_prompts_fills_missing_columns(write):
    first = DatasetSource(write([{"prompt": "a", "answer": 1}], "a.jsonl"))
    second = DatasetSource(write([{"prompt": "b", "answer": "1", "topic": "x"}], "b.jsonl"), columns=["prompt", "topic"])
    assert mixture("prompt", first, second).train.to_list() == [
        {"prompt": "a", "answer": 1, "topic": None},
        {"prompt": "b", "answer": None, "topic": "x"},
    ]
    second.columns = None
    with pytest.raises(RecipeError, match=r"cannot be joined.*answer"):
        mixture("prompt", first, second)


def test_a_mixture_of_talk_and_text_says_which_is_which(write):
    sources = DatasetSource(write([{"text": "a"}], "plain.jsonl")), DatasetSource(write([MESSAGES], "talk.jsonl"))
    with pytest.raises(RecipeError, match=r"conversations \(.*talk.jsonl\) and plain text \(.*plain.jsonl\)"):
        mixture("sft", *sources)


def test_messages_and_instructions_are_joined_as_messages(write, caplog):
    sources = DatasetSource(write([INSTRUCTION], "a.jsonl")), DatasetSource(write([MESSAGES], "b.jsonl"))
    assert mixture("sft", *sources).train.to_list() == [{"messages": [*ADD, bot("3")]}, MESSAGES]
    assert "joined as `messages`" in caplog.text


def test_fractions_take_the_first_rows_in_the_asked_shares(write):
    first = write([{"text": f"a{n}"} for n in range(30)], "a.jsonl")
    second = write([{"text": f"b{n}"} for n in range(10)], "b.jsonl")
    data = mixture("sft", DatasetSource(first, fraction=1), DatasetSource(second, fraction=3))
    assert data.train["text"] == ["a0", "a1", "a2", *(f"b{n}" for n in range(10))]
    assert [source["read"] for source in data.report["train"]["sources"]] == [3, 10]
    with pytest.raises(RecipeError, match="`fraction`"):
        mixture("sft", DatasetSource(first, fraction=1), DatasetSource(second))


def test_data_files_with_a_pattern(write, tmp_path):
    for name in ("a", "b"):
        write([{"text": name}], f"many/{name}.jsonl")
    files = str(tmp_path / "many" / "*.jsonl")
    data = mixture("sft", DatasetSource("json", data_files=files), DatasetSource("json", data_files={"train": files}))
    assert data.train["text"] == ["a", "b", "a", "b"]
    with pytest.raises(RecipeError, match="no data could be read"):
        mixture("sft", DatasetSource("json", data_files=str(tmp_path / "none" / "*.jsonl")))


def test_contradicting_keys(write):
    source = DatasetSource(write([{"text": "a"}]))
    with pytest.raises(RecipeError, match="either `dataset_name` or `datasets`: neither is set"):
        load_data(DataArguments(), "sft", evaluate=False, seed=0)
    for options, message in (
        ({"dataset_name": "a"}, "either `dataset_name` or `datasets`: both are set"),
        ({"eval_datasets": [source], "test_split_size": 0.5}, "`eval_datasets` and `test_split_size` both say"),
        ({"column_mapping": {"a": "text"}}, "`column_mapping` belongs to `dataset_name`"),
    ):
        with pytest.raises(ValueError, match=message):
            DataArguments(datasets=[source], **options)


def test_test_split_size_follows_the_seed(write):
    path = write([{"text": str(number)} for number in range(20)])
    first, again, other = (load(path, "sft", test_split_size=0.25, seed=seed) for seed in (1, 1, 2))
    assert first.eval["text"] == again.eval["text"]
    assert set(first.eval["text"]) != set(other.eval["text"])
    assert sorted([*first.train["text"], *first.eval["text"]], key=int) == [str(number) for number in range(20)]
    assert len(first.eval) == 5
    assert len(load(path, "sft", test_split_size=3).eval) == 3
    assert first.report["eval"]["rows"] == 5
    assert "`test_split_size: 20`" in failure(path, "sft", test_split_size=20)


def test_no_prompt_is_in_training_and_test_pairs(write):
    rows = [RANKING | {"prompt": f"Q{number}"} for number in range(10)]
    data = load(write(rows), "preference", test_split_size=0.2, seed=0)
    assert len(data.eval) == 2 * len(PAIRS)
    assert not set(data.train["prompt"]) & set(data.eval["prompt"])


def test_evaluation_data(write, tmp_path):
    path = write([{"text": "a"}], "a.jsonl")
    held_out = DatasetSource(write([{"text": "b"}], "b.jsonl"))
    assert load(path, "sft", evaluate=True, eval_datasets=[held_out]).eval["text"] == ["b"]
    write([{"text": "c"}], "corpus/train.jsonl")
    for name in (path, str(tmp_path / "corpus")):
        message = failure(name, "sft", evaluate=True)
        assert all(key in message for key in ("dataset_test_split", "eval_datasets", "test_split_size", 'eval_strategy: "no"'))
    assert "train" in failure(str(tmp_path / "corpus"), "sft", dataset_train_split="fit")


def test_the_report_is_json(write):
    report = load(write([PAIR | {"id": 1}, PAIR | {"id": 2, "prompt": "Q2"}]), "preference", test_split_size=0.5).report
    assert json.loads(json.dumps(report)) == report
    assert report["train"]["sources"][0]["unused_columns"] == ["id"]


# --- Lengths ---------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each word and each mark; every other word is one unknown token."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", chat_template=TEMPLATE)


def words(count):
    return " ".join("a" for _ in range(count))


def test_no_limit_checks_nothing(tokenizer):
    dataset = Dataset.from_dict({"text": [words(100)]})
    assert check_lengths(dataset, tokenizer, None, "error", "train") == (
        dataset,
        {"rows": 1, "truncated": 0, "unusable": 0, "dropped": 0},
    )


@pytest.mark.parametrize(
    ("taught", "mapping", "warned"), [(True, {}, True), (True, {"prompt": "instruction"}, False), (False, {}, False)]
)
def test_plain_prompts_for_a_policy_that_was_taught_conversations_are_warned_of(tmp_path, caplog, taught, mapping, warned):
    """The remedy that the message names is one."""
    stage = tmp_path / "sft"
    demonstrations = load_data(
        DataArguments(dataset_name="rlhf_recipes.tiny.splits.demonstrations", dataset_arguments={"rows": 2}),
        "sft",
        evaluate=False,
        seed=0,
    )
    assert demonstrations.report["train"]["conversational"]
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("rlhf_recipes.tiny.base"))
    tokenizer.save_pretrained(stage)
    report = demonstrations.report if taught else {}
    (stage / "recipe.json").write_text(json.dumps({"data": report}))
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nWhere?,Here.,There.\n")
    arguments = DataArguments(dataset_name=str(tmp_path / "pairs.csv"), column_mapping=mapping or None)
    data = load_data(arguments, "preference", evaluate=False, seed=0)
    data.filter_by_length(AutoTokenizer.from_pretrained(stage), 64, "truncate")
    assert ("was taught conversations" in caplog.text) == warned


@pytest.mark.parametrize("mapping", [{}, {"prompt": "instruction", "completion": "output"}])
def test_demonstrations_in_plain_text_are_said_to_be_that(write, tokenizer, caplog, mapping):
    """The remedy that the message names is one."""
    path = write([{"prompt": "Where?", "completion": "Here."}])
    data = load_data(DataArguments(dataset_name=str(path), column_mapping=mapping or None), "sft", evaluate=False, seed=0)
    data.filter_by_length(tokenizer, None, "truncate")
    assert ("plain texts: one follows the other as it stands" in caplog.text) == (not mapping)


def test_truncated_and_unusable_rows_are_told_apart(tokenizer, caplog):
    # The end-of-text token counts where TRL adds it
    lengths = [(3, 5), (3, 6), (3, 7), (9, 1), (10, 1), (11, 1)]
    rows = [{"prompt": words(prompt), "completion": " " + words(completion)} for prompt, completion in lengths]
    dataset = Dataset.from_list(rows)
    kept, report = check_lengths(dataset, tokenizer, 10, "truncate", "train")
    assert report == {"rows": 4, "truncated": 2, "unusable": 2, "dropped": 2}
    assert kept.to_list() == rows[:4]
    assert "train: of 6 rows, 2 lose the end" in caplog.text
    kept, report = check_lengths(dataset, tokenizer, 10, "drop", "train")
    assert kept.to_list() == rows[:2]
    assert report["dropped"] == 4
    with pytest.raises(RecipeError, match=r"train: of 6 rows.*such as 'a a a a a.*long_rows"):
        check_lengths(dataset, tokenizer, 10, "error", "train")
    with pytest.raises(RecipeError, match="no row is left"):
        check_lengths(dataset, tokenizer, 2, "drop", "train")


def verdict(row, tokenizer, max_length):
    """`fits`, `truncated` or `unusable`, for one row."""
    try:
        report = check_lengths(Dataset.from_list([row]), tokenizer, max_length, "truncate", "train")[1]
    except RecipeError:
        return "unusable"
    return "truncated" if report["truncated"] else "fits"


def test_a_pair_cut_to_the_same_tokens_is_unusable(tokenizer):
    row = {"prompt": "a a", "chosen": " a a a b", "rejected": " a a a a"}
    assert [verdict(row, tokenizer, length) for length in (2, 5, 6, 7)] == ["unusable", "unusable", "truncated", "fits"]
    ranking = {"prompt": "a a", "completions": [" a b", " b b b", " b b a"], "ranks": [0, 1, 2]}
    assert [verdict(ranking, tokenizer, length) for length in (4, 5, 6)] == ["unusable", "truncated", "fits"]


def test_conversations_count_the_template(tokenizer):
    row = {"messages": [user("a a"), bot("b b b")]}  # <user> a a <end> <assistant> b b b <end>
    assert [verdict(row, tokenizer, length) for length in (5, 6, 8, 9)] == ["unusable", "truncated", "truncated", "fits"]
    prompt = {"prompt": [user("a a")]}  # <user> a a <end> <assistant>
    assert [verdict(prompt, tokenizer, length) for length in (4, 5)] == ["unusable", "fits"]
    assert verdict({"prompt": "a a"}, tokenizer, 2) == "fits"


def test_conversations_need_a_template(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(RecipeError, match="chat_template_path"):
        check_lengths(Dataset.from_list([{"messages": TALK[:2]}]), bare, 5, "drop", "train")


@pytest.mark.parametrize("max_length", [12, 20, 60])
@pytest.mark.parametrize("kind", ["messages", "text"])
def test_the_shortcut_agrees_with_tokenising_everything(tokenizer, kind, max_length):
    rows = [{"text": words(size)} for size in range(1, 80)]
    if kind == "messages":
        rows = [{"messages": [user(words(1 + size % 7)), bot(words(size))] * (1 + size % 3)} for size in range(1, 80)]
        lengths = [len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows]
    else:
        lengths = [len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows]
    fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= max_length]
    assert check_lengths(Dataset.from_list(rows), tokenizer, max_length, "drop", "x")[0].to_list() == fitting


def test_short_rows_are_not_tokenised(tokenizer, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("tokenised")

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", refuse)
    short = Dataset.from_list([{"text": words(10)}])
    assert check_lengths(short, tokenizer, 100, "error", "train")[0] is short
    with pytest.raises(AssertionError, match="tokenised"):
        check_lengths(Dataset.from_list([{"text": words(60)}]), tokenizer, 100, "error", "train")


# --- Real data -------------------------------------------------------------------------------------------


@real_data
@pytest.mark.parametrize(
    ("name", "kind", "rows", "dropped"),
    [
        ("hh_pairs.train", "preference", 7642, {"empty turn": 1}),
        ("hh_pairs.eval", "preference", 833, {}),
        ("hh_pairs.eval", "ranking", 833, {}),
        ("hh_pairs.eval", "prompt", 833, {}),
        ("hh_raw.helpful-base.test", "sft", 2344, {"empty turn": 1, "two turns of one role in a row": 9}),
        (
            "hh_raw.helpful-base.test",
            "preference",
            2333,
            {"empty turn": 1, "two turns of one role in a row": 15, "chosen equal to rejected": 2, "empty completion": 3},
        ),
        ("rankings.oasst_en100", "ranking", 212, {}),
        ("rankings.oasst_en100", "sft", 212, {}),
        ("instructions.1100", "sft", 1100, {}),
        ("instructions.1100", "prompt", 1100, {}),
        ("preferences.1100", "preference", 1094, {"chosen equal to rejected": 6}),
        ("preferences.1100", "sft", 1100, {}),
        ("tinystories.1000", "sft", 1000, {}),
    ],
)
def test_real_files(name, kind, rows, dropped):
    data = load(str(REAL / f"{name}.jsonl.gz"), kind, bad_rows="drop")
    report = data.report["train"]
    assert len(data.train) == rows
    assert report["dropped"] == dropped
    assert report["read"] == rows + sum(dropped.values())


@real_data
def test_real_rankings_become_all_pairs():
    path = REAL / "rankings.oasst_en100.jsonl.gz"
    with gzip.open(path, "rt") as file:
        sizes = [len(json.loads(line)["responses"]) for line in file]
    assert len(load(str(path), "preference").train) == sum(size * (size - 1) // 2 for size in sizes)


@real_data
def test_real_transcripts_keep_their_turns():
    path = REAL / "hh_raw.helpful-base.test.jsonl.gz"
    data = load(str(path), "preference", bad_rows="drop")
    with gzip.open(path, "rt") as file:
        chosen = {json.loads(line)["chosen"].strip() for line in file}
    names = {"user": "Human", "assistant": "Assistant"}
    for row in data.train:
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]
    row = data.train[0]
    said = "\n\n".join(f"{names[message['role']]}: {message['content']}" for message in row["prompt"] + row["chosen"])
    assert said in chosen


def test_conversion_that_changes_is_not_taken_from_a_cache(write, monkeypatch):
    path = write([{"prompt": "a", "completion": "b"}])
    before = load(path, "sft").train._fingerprint
    assert load(path, "sft").train._fingerprint == before
    monkeypatch.setattr(rows, "_CODE", [*rows._CODE, "# changed"])
    assert load(path, "sft").train._fingerprint != before


@pytest.mark.parametrize("sign", [";", "\t"])
def test_a_csv_file_without_commas_is_named(tmp_path, sign):
    (tmp_path / "a.csv").write_text(f"prompt{sign}completion\na{sign}b, c\n")
    assert f"the header has no comma, and {sign!r} between its names" in failure(str(tmp_path / "a.csv"), "sft")


def test_other_split_of_a_file_is_refused(write):
    path = write([{"prompt": "a", "completion": "b"}])
    assert "a file is one split, `train`" in failure(path, "sft", dataset_train_split="validation")


@pytest.mark.parametrize("option", [{"dataset_arguments": {"rows": 1}}, {"dataset_config": "x"}])
def test_options_that_a_file_does_not_read_are_refused(write, option):
    assert "has no use for" in failure(write([{"prompt": "a", "completion": "b"}]), "sft", **option)


def test_file_of_another_format_is_not_looked_for_on_the_hub(tmp_path):
    (tmp_path / "data.txt").write_text("a")
    assert "a file must end in .json" in failure(str(tmp_path / "data.txt"), "sft")


def test_unread_keys_of_messages_are_said(write, caplog):
    message = {"role": "assistant", "content": "b", "reasoning_content": "because"}
    load(write([{"messages": [{"role": "user", "content": "a"}, message]}]), "sft")
    assert "of the messages, reasoning_content is not used" in caplog.text


def test_half_a_row_is_not_set_aside(write):
    path = write([{"prompt": "a", "completion": str(number)} for number in range(4)])
    assert "share below 1, or a whole number" in failure(path, "sft", test_split_size=1.5)
