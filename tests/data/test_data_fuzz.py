"""Random broken data files: all rows are read as they are, or one message names the file."""

import csv
import io
import json
import math

from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.data import load_data
from support import hostile
from support.data_files import bot, user

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.fuzz

# shape -> kind of the stage, row; the texts can be told apart from each other and from the keys
SHAPES = {
    "completion": ("sft", {"prompt": "Q{}?", "completion": " A{}."}),
    "instruction": ("sft", {"instruction": "Q{}?", "input": "", "output": "A{}."}),
    "messages": ("sft", {"messages": [user("Q{}?"), bot("A{}.")]}),
    "conversations": ("sft", {"conversations": [{"from": "human", "value": "Q{}?"}, {"from": "gpt", "value": "A{}."}]}),
    "text": ("sft", {"text": "Text {}."}),
    "pair": ("preference", {"prompt": "Q{}?", "chosen": "A{}.", "rejected": "B{}.", "margin": 0.5}),
    "pair without prompt": ("preference", {"chosen": [user("Q{}?"), bot("A")], "rejected": [user("Q{}?"), bot("B")]}),
    "ranking": ("ranking", {"prompt": "Q{}?", "completions": ["A", "B", "C"], "ranks": [1, 2, 2]}),
    "responses": ("ranking", {"prompt": "Q{}?", "responses": [{"text": "A", "rank": 1}, {"text": "B", "rank": 2}]}),
    "prompt": ("prompt", {"prompt": "Q{}?", "known": True, "level": 1}),
}


def rows_like(row):
    return [json.loads(json.dumps(row).replace("{}", str(number))) for number in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def content_of(rows, ending):
    """The bytes of a file of rows."""
    if ending == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ending == "json":
        return json.dumps(rows, indent=1).encode()
    if ending == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    buffer = io.BytesIO()
    Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


def load(folder, content, ending, kind):
    """The rows that a file of this content is read as, or the message."""
    path = folder / f"data.{ending}"
    path.write_bytes(content)
    arguments = DataArguments(dataset_name=str(path))
    rows, message = hostile.outcome(lambda: load_data(arguments, kind, evaluate=False, seed=0).train.to_list())
    assert message is None or str(path) in message, message
    return rows, message


def texts_in(value):
    """All texts in nested lists and mappings, without surrounding space."""
    if isinstance(value, str):
        return [value.strip()]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in texts_in(item)]


@pytest.mark.parametrize("shape", SHAPES)
@hostile.examples(10)
@given(data=st.data())
def test_a_changed_value_leaves_the_other_rows_as_they_are(folder, shape, data):
    kind, row = SHAPES[shape]
    rows, ending = rows_like(row), data.draw(st.sampled_from(["jsonl", "json"]))
    plain, _ = load(folder, content_of(rows, ending), ending, kind)
    path = data.draw(st.sampled_from(hostile.places(rows)))
    new = data.draw(hostile.values.filter(lambda value: "\\x00" not in repr(value)))  # a name of no column of Arrow
    read, message = load(folder, content_of(hostile.replaced(rows, path, new), ending), ending, kind)
    if message is not None:
        return
    assert len(read) == len(rows)
    assert [row for n, row in enumerate(read) if n != path[0]] == [row for n, row in enumerate(plain) if n != path[0]]
    if isinstance(new, str) and new.strip() and path[-1] not in ("role", "from"):
        assert new.strip() in "\n".join(texts_in(read[path[0]]))
    assert all(math.isfinite(rank) for row in read for rank in row.get("ranks", ()))


@hostile.examples(20)
@given(text=hostile.texts)
def test_a_text_is_the_same_out_of_every_format(folder, text):
    rows = [{"prompt": "Q?", "completion": "A."}, {"prompt": "R?", "completion": text}]
    for ending in ("jsonl", "json", "csv", "parquet"):
        try:
            content = content_of(rows, ending)
        except (UnicodeEncodeError, csv.Error):  # texts that no file of the format holds
            continue
        read, message = load(folder, content, ending, "sft")
        assert message is not None or read == rows, (ending, read)
        assert message is None or not text.strip(), message


def expected(content, ending):
    """What Python's own readers make of a file."""
    text = content.decode("utf-8-sig")
    if ending == "csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        return [row for row in rows if any((value or "").strip() for value in row.values())]
    return [json.loads(line) for line in text.split("\n") if line.strip()] if ending == "jsonl" else json.loads(text)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@hostile.examples(40)
@given(data=st.data())
def test_a_spoilt_file_is_read_as_it_is_or_rejected(folder, ending, data):
    content = data.draw(hostile.spoilt_bytes(content_of(rows_like(SHAPES["completion"][1]), ending)))
    read, message = load(folder, content, ending, "sft")
    if message is None:
        assert read == [{key: row[key] for key in ("prompt", "completion")} for row in expected(content, ending)]
