"""Groups in JSONL files, and how the page shows them."""

import json

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.groups import GROUPS, Group, read_groups
from rlhf_recipes.feedback.labels import Label
from rlhf_recipes.feedback.labels.task_view import TaskView

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


def test_each_labeller_gets_a_fixed_random_order_with_equal_answers_once():
    group = Group("g", "Q", ["a", "b", "c", "b ", "d"])
    views = [TaskView(group, f"labeller {number}", "seed") for number in range(40)]
    orders = {tuple(view.content(None)["completions"]) for view in views}
    assert len(orders) > 10
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    texts = views[0].content(None)["completions"]
    ranks = {"a": 1, "b": 2, "c": None, "d": 2}
    assert views[0].group_ranks([ranks[text] for text in texts]) == [1, 2, None, 2, 2]
    again = TaskView(group, "labeller 0", "seed")
    assert again.content(None) == views[0].content(None)
    before = again.content(Label("g", "labeller 0", [1, 2, None, 2, 2]))["before"]
    assert before["ranks"] == [ranks[text] for text in texts]


def test_the_page_does_not_get_the_sources():
    view = TaskView(Group("g", "Q", ["a", "b"], ["secret-1", "secret-2"]), "anna", "seed")
    assert "secret" not in json.dumps(view.content(None))
