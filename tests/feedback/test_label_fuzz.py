"""Random broken groups and labels: they are read as they are, or one message names the file."""

import json

from rlhf_recipes.feedback.labels import Group, Label, Store, export_labels, import_labels, read_groups
from support import hostile

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.fuzz

GROUPS = [
    {"id": "one", "prompt": "Q?", "completions": ["A", "B", "C"], "sources": ["sft", "ppo", "sft"]},
    {"id": "two", "prompt": "R?", "completions": ["D", ""]},
    {"id": "three", "prompt": "S?", "completions": ["E", "F"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def exported(folder) -> list[dict]:
    """The rows of a labels.jsonl."""
    with Store(folder / "valid.sqlite") as store:
        store.add([Group(**GROUPS[0]), Group(**GROUPS[2])])
        store.save(Label("one", "Ann", [1, 2, None], "Better", "note"))
        store.save(Label("three", "Ann", None))
        store.save(Label("one", "Bob", [2, 1, 1]))
        export_labels(store, folder / "export")
    return [json.loads(line) for line in (folder / "export" / "labels.jsonl").read_text().splitlines()]


@hostile.examples(60)
@given(data=st.data())
def test_groups(folder, data):
    path = data.draw(st.sampled_from(hostile.places(GROUPS)))
    rows = hostile.replaced(GROUPS, path, data.draw(hostile.values))
    file = folder / "groups.jsonl"
    file.write_bytes(json_lines(rows))
    groups, message = hostile.outcome(lambda: read_groups(file))
    if message is not None:
        assert str(file) in message
        return
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [group.prompt for group in groups] == [row["prompt"] for row in rows]
    (folder / "groups.sqlite").unlink(missing_ok=True)
    with Store(folder / "groups.sqlite") as store:
        store.add(groups)
        assert store.groups() == [group for group in groups if group.comparable()]


@hostile.examples(60)
@given(data=st.data())
def test_imports(folder, exported, data):
    """Labels come back as they were exported, or nothing is imported."""
    path = data.draw(st.sampled_from(hostile.places(exported)))
    rows = hostile.replaced(exported, path, data.draw(hostile.values))
    file = folder / "labels.jsonl"
    file.write_bytes(json_lines(rows))
    (folder / "import.sqlite").unlink(missing_ok=True)
    with Store(folder / "import.sqlite") as store:
        number, message = hostile.outcome(lambda: import_labels(store, file))
        if message is None:
            assert number == len(store.labels()) == sum(len(row["labels"]) for row in rows)
        else:
            assert str(file) in message
            assert not store.groups()


@hostile.examples(40)
@given(data=st.data())
def test_bytes_of_an_export(folder, exported, data):
    file = folder / "labels.jsonl"
    file.write_bytes(data.draw(hostile.spoilt_bytes(json_lines(exported))))
    (folder / "import.sqlite").unlink(missing_ok=True)
    with Store(folder / "import.sqlite") as store:
        _, message = hostile.outcome(lambda: import_labels(store, file))
        assert message is None or str(file) in message
