"""Groups in JSONL files."""

import json

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.groups import GROUPS, Group, read_groups

import pytest

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_groups_are_texts_or_messages(tmp_path):
    texts = write(tmp_path / GROUPS, {"prompt": "Q", "completions": ["a", ""], "sources": ["x", "y"], "id": "i", "level": 3})
    (group,) = read_groups(texts)
    assert group == Group("i", "Q", ["a", ""], ["x", "y"])
    assert group.columns == {"level": 3}
    assert read_groups(tmp_path) == [group]
    mixed = {"prompt": "Q", "completions": [[ANSWER], "b"]}
    (group,) = read_groups(write(tmp_path / "messages.jsonl", mixed, {"prompt": [USER], "completions": ["a", "b"]}))
    assert group.prompt == [USER]
    assert group.completions == [[ANSWER], [{"role": "assistant", "content": "b"}]]


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "completions"),
        ([], "object"),
        ({"prompt": "Q", "completions": ["a"]}, "completions"),
        ({"prompt": " ", "completions": ["a", "b"]}, "prompt: is empty"),
        ({"prompt": "Q", "completions": ["a", None]}, "completions.1"),
        ({"prompt": "Q", "completions": ["a", "\ud800"]}, "JSON"),
        ({"prompt": "Q", "completions": ["a", [USER]]}, "completions: each must be one message of the assistant"),
        ({"prompt": [{"role": "user"}], "completions": ["a", "b"]}, "prompt.messages.0.content"),
        ({"prompt": [{"role": "system", "content": "Q"}], "completions": ["a", "b"]}, "prompt: ends with a turn of the system"),
        ({"prompt": [USER, USER], "completions": ["a", "b"]}, "prompt: .* two turns in a row"),
        ({"prompt": "Q", "completions": ["a", "b"], "sources": ["x"]}, "sources: 1 names for 2"),
        ({"prompt": "Q", "completions": ["a", "b"], "id": 7}, "id"),
        ({"prompt": "Q", "completions": ["a", "c"], "id": "first"}, "id: 'first'"),
        ({"prompt": [USER], "completions": ["a", "b"]}, "prompt: texts and messages are mixed"),
    ],
)
def test_an_invalid_row_is_named(tmp_path, row, key):
    path = write(tmp_path / GROUPS, {"prompt": "Q", "completions": ["a", "b"], "id": "first"}, row)
    with pytest.raises(RecipeError, match=rf"{path}: row 2: .*{key}"):
        read_groups(path)


@pytest.mark.parametrize(
    ("content", "problem"), [(b"{", "row 1"), (b"", "no rows"), (b"\xff\xfe", "row 1"), (None, "No such file")]
)
def test_a_file_without_groups_is_named(tmp_path, content, problem):
    path = tmp_path / GROUPS
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=f"{path}: .*{problem}"):
        read_groups(path)


def test_answers_that_were_cut_off_are_warned_of(tmp_path, caplog):
    write(tmp_path / GROUPS, {"prompt": "Q", "completions": ["a", "b"]})
    record = {"arguments": {"max_completion_length": 7}, "answers": 9}
    for ended in (4, 5):
        (tmp_path / "sample.json").write_text(json.dumps(record | {"ended": ended}))
        read_groups(tmp_path)
    (warning,) = caplog.messages
    assert "only 4 of 9 answers end with EOS" in warning
    assert "`max_completion_length: 7`" in warning
