"""The shapes of data: what each kind of stage makes of a row, and why a row is rejected."""

import json

from rlhf_recipes.data import rows
from rlhf_recipes.data.shapes import SHAPES, Shape
from support.data_files import TALK, bot, failure, load, rows_of, user

import pytest

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
SYSTEM = {"role": "system", "content": "Be a cat."}
CAT = {"system": "Be a cat."}
HISTORY = {"history": [["Hi", "Hello"], ["Sum?", "Yes"]]}
TURNS = [user("Hi"), bot("Hello"), user("Sum?"), bot("Yes")]


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
        (INSTRUCTION | CAT | HISTORY, "sft", [{"prompt": [SYSTEM, *TURNS, *ADD], "completion": [bot("3")]}]),
        (INSTRUCTION | {"history": TURNS}, "sft", [{"prompt": [*TURNS, *ADD], "completion": [bot("3")]}]),
        (INSTRUCTION | {"system": "", "history": []}, "sft", [{"prompt": ADD, "completion": [bot("3")]}]),
        (SHAREGPT | CAT, "sft", [{"messages": [SYSTEM, *TALK[:2]]}]),
        (MESSAGES | CAT, "sft", [{"messages": [SYSTEM, *TALK, bot("So")]}]),
        ({"prompt": "Q", "completion": "A"} | CAT, "sft", [{"prompt": "Q", "completion": "A"}]),
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
        (IMPLICIT | CAT, "preference", [TALK_PAIR | {"prompt": [SYSTEM, *TALK]}]),
        (RESPONSES | CAT, "sft", [{"prompt": [SYSTEM, user("Q")], "completion": [bot("best")]}]),
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
        ({"prompt": TALK, "id": 1} | CAT, "prompt", [{"prompt": [SYSTEM, *TALK], "id": 1}]),
        (INSTRUCTION | HISTORY, "prompt", [{"prompt": [*TURNS, *ADD], "reference": "3"}]),
        ({"prompt": "Q"} | CAT, "prompt", [{"prompt": "Q"} | CAT]),
        (INSTRUCTION | {"prompt": "Below is Q."}, "sft", [{"prompt": ADD, "completion": [bot("3")]}]),
        (INSTRUCTION | {"prompt": "Below is Q."}, "prompt", [{"prompt": ADD, "reference": "3"}]),
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
def test_a_row_of_each_shape_becomes_rows_of_each_kind(write, row, kind, expected):
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
def test_a_shape_that_a_stage_cannot_use_is_one_message(write, row, kind, words):
    message = failure(write([row]), kind)
    assert words in message
    assert f"the columns are {', '.join(row)}" in message


def test_a_new_shape_is_one_entry(write, monkeypatch):
    def read(row, conversational):
        return {"prompt": row["question"], "chosen": row["good"], "rejected": row["bad"]}

    monkeypatch.setattr(rows, "SHAPES", (*SHAPES, Shape("preference", ("question", "good", "bad"), read)))
    path = write([{"question": "Q", "good": "yes", "bad": "no", "id": 1}, {"question": "Q", "good": "", "bad": "no", "id": 2}])
    assert rows_of(path, "preference", bad_rows="drop") == [{"prompt": "Q", "chosen": "yes", "rejected": "no"}]
    assert rows_of(path, "prompt") == [{"prompt": "Q", "id": 1}, {"prompt": "Q", "id": 2}]


def test_tools_may_speak_between_assistant_turns(write):
    row = {"messages": [user("a"), bot("look"), {"role": "tool", "content": "b"}, {"role": "tool", "content": "c"}, bot("d")]}
    assert rows_of(write([row]), "sft") == [row]


@pytest.mark.parametrize(
    ("row", "kind", "unread"),
    [
        (SHAREGPT | CAT | {"tools": '[{"name": "f"}]'}, "sft", "tools"),
        ({"prompt": "Q", "completion": "A", "label": False, "history": [["a", "b"]]}, "sft", "label, history"),
        ({"prompt": "Q", "completion": "A"} | CAT, "sft", "system"),
        (PAIR | {"images": ["a.png"]}, "preference", "images"),
        ({"prompt": "Q", "level": 1, "tools": "[]"} | CAT, "prompt", "tools, system"),  # rewards get `level`
        (INSTRUCTION | {"history": [], "tools": None, "system": ""}, "sft", None),
    ],
)
def test_columns_that_are_not_read_are_named(write, caplog, row, kind, unread):
    load(write([row]), kind)
    message = f"these columns are not read: {unread}."
    assert (message in caplog.text) if unread else "not read" not in caplog.text


@pytest.mark.parametrize("name", ["completions", "prompts", "image", "trainer_state", "completion_ids"])
def test_columns_of_prompts_that_trl_reads_are_refused(write, name):
    path = write([{"instruction": "Add", name: "x"}])
    assert f"{path}: {name}: " in (message := failure(path, "prompt"))
    assert "column_mapping" in message
    assert rows_of(path, "prompt", column_mapping={name: "other"}) == [{"prompt": [user("Add")], "other": "x"}]


@pytest.mark.parametrize("references", [[["a", "b"], ["c"]], [["a", "b"], "c"], ["c", ["a"], None], ['["a", "b"]', "c"]])
def test_a_reference_may_be_several(write, references):
    rows = [{"prompt": str(number), "reference": reference} for number, reference in enumerate(references)]
    assert rows_of(write(rows), "prompt") == rows


def test_ignored_keys_of_messages_are_named(write, caplog):
    row = {"messages": [user("a"), bot("b") | {"reasoning_content": "because"}]}
    for written in (row, as_text(row)):
        caplog.clear()
        load(write([written]), "sft")
        assert "reasoning_content" in caplog.text


def test_a_changed_conversion_changes_the_fingerprint(write, monkeypatch):
    path = write([{"prompt": "a", "completion": "b"}])
    before = load(path, "sft").train._fingerprint
    assert load(path, "sft").train._fingerprint == before
    monkeypatch.setattr(rows, "_CODE", [*rows._CODE, "# changed"])
    assert load(path, "sft").train._fingerprint != before


# --- Lists written as text, and odd rows -----------------------------------------------------------------


def as_text(row, write_value=json.dumps):
    return {key: value if isinstance(value, str) else write_value(value) for key, value in row.items()}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": TALK, "completion": [bot("A")]}, "sft"),
        (MESSAGES, "sft"),
        (SHAREGPT, "sft"),
        (TALK_PAIR, "preference"),
        (IMPLICIT, "preference"),
        (RANKING, "ranking"),
        (RESPONSES, "preference"),
        (INSTRUCTION | HISTORY, "sft"),
        ({"prompt": TALK, "answer": "a"}, "prompt"),
        ({"prompt": "List the staff.", "completion": '[{"name": "Ann", "role": "cook"}]'}, "sft"),  # no messages
    ],
)
def test_lists_written_as_json_are_read(write, ending, row, kind):
    read = rows_of(write([as_text(row)], f"data.{ending}"), kind)
    assert read == rows_of(write([row], "lists.jsonl"), kind)


@pytest.mark.parametrize("write_list", [list, json.dumps])
def test_messages_written_as_text_within_lists_are_read(write, write_list):
    good, worse = [bot("A")], [bot("B")]
    ranking = {"prompt": TALK, "completions": [good, worse], "ranks": [0, 1]}
    expected = rows_of(write([ranking], "lists.jsonl"), "ranking")
    completions = {"completions": write_list(list(map(json.dumps, ranking["completions"])))}
    responses = [{"text": json.dumps(answer), "rank": rank} for rank, answer in enumerate(ranking["completions"])]
    for row in (ranking | completions, {"prompt": TALK, "responses": write_list(responses)}):
        assert rows_of(write([row]), "ranking") == expected


@pytest.mark.parametrize("write_value", [dict, json.dumps])
def test_one_message_is_no_list_of_messages_as_text_either(write, write_value):
    row = {"prompt": write_value(user("Q")), "completion": write_value(bot("A"))}
    assert "prompt is neither text nor a list of messages" in failure(write([row]), "sft")


def as_numpy(value):
    """As pandas writes lists that it read from Parquet."""
    return "\n ".join(str(value).split(", {"))


@pytest.mark.parametrize("write_value", [str, as_numpy, lambda value: json.dumps(value)[:-1]])
@pytest.mark.parametrize(
    ("row", "kind", "column"),
    [
        ({"prompt": TALK, "completion": [bot("A")]}, "sft", "prompt"),
        (TALK_PAIR, "preference", "chosen"),
        (SHAREGPT, "sft", "messages"),
    ],
)
def test_lists_written_in_another_way_are_bad_rows(write, write_value, row, kind, column):
    message = failure(write([as_text(row, write_value)], "data.csv"), kind)
    assert "as text, but not as JSON" in message
    good = [as_text(row)] * 2
    path = write([as_text(row, write_value), *good], "data.csv")
    assert len(rows_of(path, kind, bad_rows="drop")) == 2


def test_messages_in_a_column_of_texts_are_refused(write):
    assert "column_mapping: {text: messages}" in failure(write([as_text({"text": TALK})]), "sft")


@pytest.mark.parametrize(
    ("odd", "good", "kind"),
    [
        (dict.fromkeys(HH, "Human - Hi\n\nAssistant - Hello"), HH, "preference"),
        (dict.fromkeys(HH, ""), HH, "sft"),
        ({"prompt": "Q"}, {"prompt": TALK, "completion": [bot("A")]}, "sft"),
        ({"prompt": "Q", "completion": "A"}, {"messages": TALK[:2]}, "sft"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, HH, "preference"),
    ],
)
def test_the_first_row_alone_does_not_decide(write, odd, good, kind):
    columns = odd.keys() | good.keys()
    rows = [dict.fromkeys(columns) | row for row in (odd, good, good)]
    read = rows_of(write(rows), kind, bad_rows="drop")
    assert read[-2:] == rows_of(write([good, good], "good.jsonl"), kind)


def test_odd_rows_among_plain_text_are_named(write, caplog):
    odd = as_text({"prompt": TALK, "completion": "A"})
    assert len(rows_of(write([odd, QUESTION, QUESTION]), "sft")) == 3
    assert "1 of 3 values of `prompt` look like conversations" in caplog.text


# --- Bad rows --------------------------------------------------------------------------------------------

TEXT, QUESTION = {"text": "fine"}, {"prompt": "Q", "completion": "A"}
CHAT, CHAT_QUESTION = {"messages": TALK[:2]}, {"prompt": TALK, "completion": [bot("A")]}
TEXTS = {"chosen": "a b", "rejected": "a c"}


@pytest.mark.parametrize(
    ("good", "change", "kind", "reason"),
    [
        (PAIR, {"prompt": " "}, "preference", "empty prompt"),
        (PAIR, {"prompt": None}, "prompt", "empty prompt"),
        (INSTRUCTION, {"instruction": ""}, "sft", "empty prompt"),
        (PAIR, {"rejected": "\n"}, "preference", "empty completion"),
        (QUESTION, {"completion": None}, "sft", "empty completion"),
        (TEXT, {"text": "\t"}, "sft", "empty text"),
        (PAIR, {"rejected": " good"}, "preference", "chosen equal to rejected"),
        (TEXTS, {"rejected": "a b"}, "preference", "chosen equal to rejected"),
        (TEXTS, {"rejected": "c b"}, "preference", "chosen and rejected without a common prompt"),
        (IMPLICIT, {"rejected": IMPLICIT["chosen"]}, "preference", "chosen equal to rejected"),
        (CHAT, {"messages": [user("a"), user("b"), bot("c")]}, "sft", "two turns of one role in a row"),
        (CHAT_QUESTION, {"prompt": [user("a"), bot("b")]}, "sft", "two turns of one role in a row"),
        (
            CHAT_QUESTION,
            {"prompt": [user("a"), bot("b")], "completion": [user("c"), bot("d")]},
            "sft",
            "a prompt that does not end with a user turn",
        ),
        (
            CHAT_QUESTION,
            {"completion": [bot("b"), user("c"), bot("d")]},
            "sft",
            "a completion with turns that are not the assistant's",
        ),
        (CHAT, {"messages": [user("a"), bot(" "), user("b"), bot("c")]}, "sft", "empty turn"),
        (CHAT, {"messages": TALK}, "sft", "messages that do not end with an assistant turn"),
        (CHAT, {"messages": [user("a"), {"role": "bot", "content": "b"}]}, "sft", "unknown role 'bot'"),
        (
            CHAT,
            {"messages": [user("a"), {"role": "system", "content": "b"}, bot("c")]},
            "sft",
            "a system turn that is not first",
        ),
        (CHAT, {"messages": [user("a"), bot("b") | {"tool_calls": [{"name": "f"}]}]}, "sft", "tool calls"),
        (CHAT, {"messages": "a"}, "sft", "messages that do not end with an assistant turn"),
        (CHAT, {"messages": [user(1), bot("c")]}, "sft", "a message that is not text"),
        (CHAT | CAT, {"messages": [SYSTEM | {"content": "Be a dog."}, *TALK[:2]]}, "sft", "a system turn beside another text"),
        (INSTRUCTION | HISTORY, {"history": [["a"]]}, "sft", "history is not a list of pairs"),
        (INSTRUCTION | HISTORY, {"history": [["a", ""]]}, "sft", "empty turn"),
        (CHAT, {"messages": [user("a")]}, "prompt", "messages without an assistant turn"),
        ({"prompt": TALK}, {"prompt": [{"role": "system", "content": "a"}]}, "prompt", "a prompt without a user turn"),
        (HH, {"rejected": HH["rejected"] + "\n\nHuman: Oh"}, "preference", "does not end with an Assistant turn"),
        (HH, {"rejected": "No"}, "preference", "not a transcript"),
        (HH, {"rejected": HH["rejected"] + "\n\nAssistant: Oh"}, "preference", "two turns of one role in a row"),
        (RANKING, {"ranks": [0, 1]}, "ranking", "ranks of other length than completions"),
        (RANKING, {"completions": ["a"], "ranks": [0]}, "ranking", "fewer than two completions"),
        (RANKING, {"ranks": [1, 1, 1, 1]}, "preference", "all completions tie"),
        (RANKING, {"ranks": [0, 1, float("nan"), 2]}, "ranking", "rank is not a finite number"),
        (RANKING, {"completions": ["a", "a", "b", "c"]}, "preference", "equal completions of different rank"),
        (RESPONSES, {"responses": [{"text": "a", "rank": 0}, {"text": "", "rank": 1}]}, "ranking", "empty completion"),
        (PAIR | {"margin": 1.5}, {"margin": None}, "preference", "margin is not a finite number"),
        ({"prompt": "Q"}, {"prompt": 3}, "prompt", "prompt is not text"),
        (PAIR, {"chosen": 3}, "preference", "chosen is not text"),
        (TALK_PAIR, {"chosen": 3}, "preference", "chosen is neither text nor a list of messages"),
    ],
)
def test_bad_rows_stop_with_file_and_row_or_are_dropped_and_counted(write, caplog, good, change, kind, reason):
    path = write([good, good | change, good])
    message = failure(path, kind)
    assert f"{path}, row 2: " in message
    assert reason in message
    assert "1 of 3 rows" in message

    caplog.clear()
    data = load(path, kind, bad_rows="drop")
    ((counted, count),) = data.report["train"]["dropped"].items()
    assert reason in counted
    assert count == 1
    assert data.train.to_list() == rows_of(write([good, good], "good.jsonl"), kind)
    assert f"{path}, row 2: {counted}" in caplog.text


def test_several_reasons_are_counted_and_the_first_rows_named(write):
    bad = [{"prompt": "", "completion": "A"}] * 4 + [{"prompt": "Q", "completion": ""}] * 2
    message = failure(write([*bad, QUESTION]), "sft")
    assert "6 of 7 rows of the train data (4 empty prompt, 2 empty completion)" in message
    assert "row 3" in message
    assert "row 4" not in message


def test_no_rows_left_is_always_an_error(write):
    assert "No rows are left" in failure(write([{"text": ""}]), "sft", bad_rows="drop")


def test_a_bad_answer_that_a_stage_does_not_read_is_no_bad_row(write):
    assert rows_of(write([PAIR | {"rejected": "good"}]), "sft") == [{"prompt": "Q", "completion": "good"}]
