"""Mixtures of sources, evaluation data, and the counts of real data."""

import gzip
import json

from rlhf_recipes.config.data import DataArguments, DatasetSource
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.data import load_data
from support.data_files import bot, failure, load, user

import pytest

PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
MESSAGES = {"messages": [user("Hi"), bot("So")]}


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


def test_a_mixture_of_conversations_and_text_is_rejected(write):
    sources = DatasetSource(write([{"text": "a"}], "plain.jsonl")), DatasetSource(write([MESSAGES], "talk.jsonl"))
    with pytest.raises(RecipeError, match=r"conversations \(.*talk.jsonl\) and plain text \(.*plain.jsonl\)"):
        mixture("sft", *sources)


def test_messages_and_instructions_are_joined_as_messages(write, caplog):
    instruction = {"instruction": "Add", "input": "1 2", "output": "3"}
    sources = DatasetSource(write([instruction], "a.jsonl")), DatasetSource(write([MESSAGES], "b.jsonl"))
    assert mixture("sft", *sources).train.to_list() == [{"messages": [user("Add\n1 2"), bot("3")]}, MESSAGES]
    assert "joined as `messages`" in caplog.text


def test_fractions_take_the_first_rows_of_each_source(write):
    first = write([{"text": f"a{n}"} for n in range(30)], "a.jsonl")
    second = write([{"text": f"b{n}"} for n in range(10)], "b.jsonl")
    data = mixture("sft", DatasetSource(first, fraction=1), DatasetSource(second, fraction=3))
    assert data.train["text"] == ["a0", "a1", "a2", *(f"b{n}" for n in range(10))]
    assert [source["read"] for source in data.report["train"]["sources"]] == [3, 10]
    with pytest.raises(RecipeError, match="fraction: "):
        mixture("sft", DatasetSource(first, fraction=1), DatasetSource(second))


def test_data_files_with_a_pattern(write, tmp_path):
    for name in ("a", "b"):
        write([{"text": name}], f"many/{name}.jsonl")
    files = str(tmp_path / "many" / "*.jsonl")
    data = mixture("sft", DatasetSource("json", data_files=files), DatasetSource("json", data_files={"train": files}))
    assert data.train["text"] == ["a", "b", "a", "b"]
    with pytest.raises(RecipeError, match="json: no data"):
        mixture("sft", DatasetSource("json", data_files=str(tmp_path / "none" / "*.jsonl")))


def test_contradicting_and_missing_keys(write):
    source = DatasetSource(write([{"text": "a"}]))
    with pytest.raises(RecipeError, match="dataset_name: missing"):
        load_data(DataArguments(), "sft", evaluate=False, seed=0)
    for options, keys in (
        ({"dataset_name": "a"}, "dataset_name.*datasets"),
        ({"eval_datasets": [source], "test_split_size": 0.5}, "eval_datasets.*test_split_size"),
        ({"column_mapping": {"a": "text"}}, "column_mapping.*dataset_name"),
    ):
        with pytest.raises(ValueError, match=keys):
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
    for size in (20, 1.5):
        assert f"test_split_size: {size}: " in failure(path, "sft", test_split_size=size)


def test_no_prompt_is_in_training_and_test_pairs(write):
    rows = [{"prompt": f"Q{number}", "completions": ["a", "b", "c"], "ranks": [2, 0, 1]} for number in range(10)]
    data = load(write(rows), "preference", test_split_size=0.2, seed=0)
    assert len(data.eval) == 2 * 3
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


# --- Real data -------------------------------------------------------------------------------------------


@pytest.mark.real
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
def test_real_files_are_read_with_these_counts(shared, name, kind, rows, dropped):
    data = load(str(shared / "data" / f"{name}.jsonl.gz"), kind, bad_rows="drop")
    report = data.report["train"]
    assert len(data.train) == rows
    assert report["dropped"] == dropped
    assert report["read"] == rows + sum(dropped.values())


@pytest.mark.real
def test_real_rankings_become_all_pairs(shared):
    path = shared / "data" / "rankings.oasst_en100.jsonl.gz"
    with gzip.open(path, "rt") as file:
        sizes = [len(json.loads(line)["responses"]) for line in file]
    assert len(load(str(path), "preference").train) == sum(size * (size - 1) // 2 for size in sizes)


@pytest.mark.real
def test_real_transcripts_keep_their_turns(shared):
    path = shared / "data" / "hh_raw.helpful-base.test.jsonl.gz"
    data = load(str(path), "preference", bad_rows="drop")
    with gzip.open(path, "rt") as file:
        chosen = {json.loads(line)["chosen"].strip() for line in file}
    names = {"user": "Human", "assistant": "Assistant"}
    for row in data.train:
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]
    row = data.train[0]
    transcript = "\n\n".join(f"{names[message['role']]}: {message['content']}" for message in row["prompt"] + row["chosen"])
    assert transcript in chosen
