"""Data of every shape and format, spoilt: all rows are read as they stand there, or one message says what is wrong in which."""

import csv
import gzip
import io
import json
import math
from pathlib import Path

from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.data import load_data
from support import hostile

import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import assume, given
from hypothesis import strategies as st

disable_progress_bars()


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


# shape -> kind of the stage, rows. Texts are long enough to be told from each other and from the keys
SHAPES = {
    "completion": ("sft", [{"prompt": f"Q{n}?", "completion": f" A{n}."} for n in range(4)]),
    "alpaca": ("sft", [{"instruction": f"Q{n}?", "input": "", "output": f"A{n}."} for n in range(4)]),
    "messages": ("sft", [{"messages": [user(f"Q{n}?"), bot(f"A{n}.")]} for n in range(4)]),
    "sharegpt": (
        "sft",
        [{"conversations": [{"from": "human", "value": f"Q{n}?"}, {"from": "gpt", "value": f"A{n}."}]} for n in range(4)],
    ),
    "text": ("sft", [{"text": f"Text {n}."} for n in range(4)]),
    "pairs": ("preference", [{"prompt": f"Q{n}?", "chosen": f"A{n}.", "rejected": f"B{n}.", "margin": 0.5} for n in range(4)]),
    "talks": ("preference", [{"chosen": [user(f"Q{n}?"), bot("A")], "rejected": [user(f"Q{n}?"), bot("B")]} for n in range(4)]),
    "rankings": ("ranking", [{"prompt": f"Q{n}?", "completions": ["A", "B", "C"], "ranks": [1, 2, 2]} for n in range(4)]),
    "responses": (
        "ranking",
        [{"prompt": f"Q{n}?", "responses": [{"text": "A", "rank": 1}, {"text": "B", "rank": 2}]} for n in range(4)],
    ),
    "prompts": ("prompt", [{"prompt": f"Q{n}?", "known": True, "level": n} for n in range(4)]),
    "questions": ("prompt", [{"prompt": [user(f"Q{n}?")], "completion": [bot(f"A{n}.")]} for n in range(4)]),
}
FLAT = ("completion", "alpaca", "text", "pairs", "prompts")  # which CSV can hold


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def written(rows: list, ending: str) -> bytes:
    """The content of a file of rows."""
    if ending == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ending == "json":
        return json.dumps(rows, indent=1).encode()
    if ending.endswith(".gz"):
        return gzip.compress(written(rows, ending.removesuffix(".gz")))
    if ending == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")
    buffer = io.BytesIO()
    Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


def load(folder: Path, content: bytes, ending: str, kind: str, **options) -> tuple[list | None, str | None]:
    """The rows that a file of this content is read as, or the message."""
    path = folder / f"data.{ending}"
    path.write_bytes(content)

    def read() -> list:
        data = load_data(DataArguments(dataset_name=str(path), **options), kind, evaluate=False, seed=0)
        dropped = sum(data.report["train"]["dropped"].values())
        assert data.report["train"]["read"] == len(data.train) + dropped or kind == "preference"
        return data.train.to_list()

    rows, message = hostile.outcome(read)
    assert message is None or str(path) in message, message
    return rows, message


def texts_in(value: object) -> list[str]:
    """All texts in nested lists and mappings, without the space around them."""
    if isinstance(value, str):
        return [value.strip()]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in texts_in(item)]


@pytest.mark.parametrize("shape", SHAPES)
@hostile.examples(10)
@given(data=st.data())
def test_values(folder, shape, data):
    """One value of one row is another: the other rows stay as they were, and a text that was put in is read as it is."""
    kind, rows = SHAPES[shape]
    ending = data.draw(st.sampled_from(["jsonl", "json", "jsonl.gz"]))
    plain, _ = load(folder, written(rows, ending), ending, kind)
    path = data.draw(st.sampled_from(hostile.places(rows)))
    new = data.draw(hostile.values)
    read, message = load(folder, written(hostile.replaced(rows, path, new), ending), ending, kind)
    if message is not None:
        return
    assert len(read) == len(rows)
    assert [row for n, row in enumerate(read) if n != path[0]] == [row for n, row in enumerate(plain) if n != path[0]]
    if isinstance(new, str) and new.strip() and path[-1] not in ("role", "from"):
        assert new.strip() in "\n".join(texts_in(read[path[0]]))
    for row in read:
        assert all(math.isfinite(rank) for rank in row.get("ranks", ()))


@hostile.examples(20)
@given(data=st.data())
def test_texts_in_every_format(folder, data):
    """Whatever text an answer is, it is the same out of every format."""
    text = data.draw(hostile.texts)
    rows = [{"prompt": "Q?", "completion": "A."}, {"prompt": "R?", "completion": text}]
    for ending in ("jsonl", "json", "csv", "parquet"):
        try:
            content = written(rows, ending)
        except (UnicodeEncodeError, csv.Error):
            continue
        read, message = load(folder, content, ending, "sft")
        assert message is not None or read == rows, (ending, read)
        assert message is None or not text.strip() or "\ud800" <= max(text) <= "\udfff", message


def expected(content: bytes, ending: str) -> list:
    """What Python's own readers make of a file."""
    text = content.decode("utf-8-sig")
    if ending == "csv":
        return [
            row for row in csv.DictReader(io.StringIO(text, newline="")) if any((value or "").strip() for value in row.values())
        ]
    return [json.loads(line) for line in text.split("\n") if line.strip()] if ending == "jsonl" else json.loads(text)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@hostile.examples(40)
@given(data=st.data())
def test_bytes(folder, ending, data):
    """Files that are cut off or spoilt: what is read is what stands there."""
    content = data.draw(hostile.spoilt_bytes(written(SHAPES["completion"][1], ending)))
    read, message = load(folder, content, ending, "sft")
    if message is None:
        assert read == [{key: row[key] for key in ("prompt", "completion")} for row in expected(content, ending)]


@pytest.mark.parametrize("ending", ["parquet", "jsonl.gz", "csv.gz"])
@hostile.examples(25)
@given(data=st.data())
def test_packed_bytes(folder, ending, data):
    """Of formats that we cannot read ourselves: as many rows as there were, all of them texts, or a message."""
    rows = SHAPES["completion"][1]
    content = data.draw(hostile.spoilt_bytes(written(rows, ending)))
    read, message = load(folder, content, ending, "sft")
    if message is None:
        assert len(read) == len(rows)
        assert len(texts_in(read)) == 2 * len(rows)


@hostile.examples(30)
@given(data=st.data())
def test_rows_and_columns(folder, data):
    """Rows that are lost, doubled or of another shape, and columns of other names."""
    kind, rows = SHAPES[data.draw(st.sampled_from(sorted(SHAPES)))]
    other = SHAPES[data.draw(st.sampled_from(sorted(SHAPES)))][1]
    rows = [dict(row) for row in rows]
    change = data.draw(st.sampled_from(["double", "mix", "rename", "lose", "add", "no mapping"]))
    place = data.draw(st.integers(0, len(rows) - 1))
    key = data.draw(st.sampled_from(sorted(rows[0])))
    if change == "double":
        rows.insert(place, rows[place])
    elif change == "mix":
        rows[place] = other[place]
    elif change == "rename":
        name = data.draw(hostile.texts)
        assume(name not in rows[0])
        rows = [{name if old == key else old: value for old, value in row.items()} for row in rows]
    elif change == "lose":
        del rows[place][key]
    elif change == "add":
        rows[place][data.draw(hostile.texts)] = data.draw(hostile.values)
    else:
        rows[place] = data.draw(hostile.leaves)
    ending = data.draw(st.sampled_from(["jsonl", "json"]))
    read, message = load(folder, written(rows, ending), ending, kind)
    if message is None:
        assert len(read) == len(rows)
        assert change != "no mapping"


ODD_FILES = [
    ("csv", "prompt,completion\na,b,c\nd,e,f\n", "row 1 has 3 cells"),
    ("csv", "prompt,completion\na,b\nd,e,f\n", "saw 3"),
    ("csv", "prompt,completion,prompt\na,b,c\n", "`prompt` twice"),
    ("csv", "prompt,completion\ra,b\r", None),
    ("csv", "prompt,completion\n" + "x" * 100_000 + ",b\n", None),
    ("jsonl", 'null\n{"prompt": "a", "completion": "b"}\n', "line 1 is no row"),  # pyarrow 26 crashes at it
    ("jsonl", '{"prompt": "a", "completion": "2024-01-01"}\n', None),  # which pyarrow takes for a date
    ("json", '[{"prompt": "a", "completion": "2024-01-01T10:00:00Z"}]', None),
    ("json", '[{"prompt": "a\\ud800", "completion": "b"}]', "row 1 has the letter"),  # which pandas leaves out
    ("json", '[{"prompt": "a", "prompt": "c", "completion": "b"}]', "'prompt' stands twice"),
    ("jsonl", '{"prompt": "a", "prompt": "c", "completion": "b"}\n', "'prompt' stands twice"),
    ("jsonl", '{"prompt": "a", "completion": "b", "x": [1, 1e999]}\n', "1e999 is too large"),  # pandas makes two rows of it
    ("jsonl", "[" * 100_000, "recursion"),
    ("jsonl", '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}\n", "recursion"),
    ("json", '[{"prompt": "a", "completion": "b", "x": ' + "9" * 5000 + "}]", "4300 digits"),
    ("json", '[{"prompt": "a", "completion": "b"}, null]', "row 2 is no row"),
    ("jsonl", '{"prompt": "a", "completion": "b", "__problem__": "x"}\n', "a name of ours"),
    ("jsonl", "\ufeff" + '{"prompt": "a", "completion": "b"}\n', None),
]


@pytest.mark.parametrize(("ending", "content", "said"), ODD_FILES, ids=[f"{one[0]}-{one[1][:40]!r}" for one in ODD_FILES])
def test_odd_files(folder, ending, content, said):
    read, message = load(folder, content.encode(), ending, "sft")
    if said is None:
        assert read == [{key: row[key] for key in ("prompt", "completion")} for row in expected(content.encode(), ending)]
    else:
        assert said in (message or ""), (read, message)


def test_a_prompt_beside_instruction_and_output(folder):
    read, _ = load(folder, b'{"instruction": "Q?", "output": "A", "prompt": "Below is Q?"}\n', "jsonl", "sft")
    assert read == [{"prompt": [user("Q?")], "completion": [bot("A")]}]
    read, _ = load(folder, b'{"instruction": "Q?", "output": "A", "prompt": "Below is Q?"}\n', "jsonl", "prompt")
    assert read == [{"prompt": [user("Q?")], "reference": "A"}]


def test_dates_in_a_slice(folder):
    content = "".join(f'{{"prompt": "When, {day}?", "completion": "2024-01-0{day}"}}\n' for day in range(1, 6))
    (folder / "dates.jsonl").write_text(content)
    arguments = DataArguments(dataset_name=str(folder / "dates.jsonl"), dataset_train_split="train[1:2]+train[-1:]")
    rows = load_data(arguments, "sft", evaluate=False, seed=0).train.to_list()
    assert [row["completion"] for row in rows] == ["2024-01-02", "2024-01-05"]
