"""Convert the forms that rows are read into to what stages train on."""

import itertools
from collections.abc import Callable
from typing import Any, Literal

from rlhf_recipes.data.shapes import BadRowError, Form, Row

Kind = Literal["sft", "preference", "ranking", "prompt"]
"""What a stage trains on, with the columns of the form of the same name:

- `"sft"`: those of the forms `text`, `messages` or `completion`
- `"preference"`: those of the form `preference`
- `"ranking"`: those of the form `ranking`
- `"prompt"`: `prompt`, a `reference: str` where the data have an answer, and every other column unchanged
"""


def _check_text(row: Row) -> list[Row]:
    if not row["text"].strip():
        raise BadRowError("empty text")
    return [row]


def _check_messages(row: Row) -> list[Row]:
    messages = row["messages"]
    _check_order(messages)
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRowError("messages that do not end with an assistant turn")
    if not _last_text(messages):
        raise BadRowError("empty completion")
    return [row]


def _demonstration(row: Row) -> list[Row]:
    _check_answer(row["prompt"], row["completion"])
    return [row]


def _chosen_answer(row: Row) -> list[Row]:
    return _demonstration({"prompt": row["prompt"], "completion": row["chosen"]})


def _best_answer(row: Row) -> list[Row]:
    best = row["completions"][row["ranks"].index(min(row["ranks"]))]
    return _demonstration({"prompt": row["prompt"], "completion": best})


def _pair(row: Row) -> list[Row]:
    if _stripped(row["chosen"]) == _stripped(row["rejected"]):
        raise BadRowError("chosen equal to rejected")
    _check_answer(row["prompt"], row["chosen"])
    _check_answer(row["prompt"], row["rejected"])
    return [row]


def _pair_as_ranking(row: Row) -> list[Row]:
    _pair(row)
    return [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "ranks": [0.0, 1.0]}]


def _ranking(row: Row) -> list[Row]:
    for completion in row["completions"]:
        _check_answer(row["prompt"], completion)
    if len(set(row["ranks"])) == 1:
        raise BadRowError("all completions tie")
    ranks: dict[str, float] = {}
    for completion, rank in zip(row["completions"], row["ranks"], strict=True):
        if ranks.setdefault(_stripped(completion), rank) != rank:
            raise BadRowError("equal completions of different rank")
    return [row]


def _ranking_as_pairs(row: Row) -> list[Row]:
    """Return each two completions that do not tie, as a pair."""
    _ranking(row)
    ranked = zip(row["ranks"], row["completions"], strict=True)
    pairs = (sorted(pair, key=lambda entry: entry[0]) for pair in itertools.combinations(ranked, 2))
    return [
        {"prompt": row["prompt"], "chosen": better, "rejected": worse} for (low, better), (high, worse) in pairs if low < high
    ]


def _prompt(row: Row) -> list[Row]:
    _check_prompt(row["prompt"])
    return [{"prompt": row["prompt"]}]


def _prompt_and_reference(row: Row) -> list[Row]:
    (prompt,) = _prompt(row)
    reference = _last_text(row["completion"])
    if not reference:
        raise BadRowError("empty completion")
    return [prompt | {"reference": reference}]


def _last_question(row: Row) -> list[Row]:
    """Return a conversation up to its last answer, and the answer."""
    messages = row["messages"]
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRowError("messages without an assistant turn")
    return _prompt_and_reference({"prompt": messages[: answers[-1]], "completion": [messages[answers[-1]]]})


CONVERTERS: dict[Kind, dict[Form, Callable[[Row], list[Row]]]] = {
    "sft": {
        "preference": _chosen_answer,
        "ranking": _best_answer,
        "completion": _demonstration,
        "messages": _check_messages,
        "text": _check_text,
    },
    "preference": {"preference": _pair, "ranking": _ranking_as_pairs},
    "ranking": {"ranking": _ranking, "preference": _pair_as_ranking},
    "prompt": {
        "preference": _prompt,
        "ranking": _prompt,
        "completion": _prompt_and_reference,
        "prompt": _prompt,
        "messages": _last_question,
    },
}
"""By kind and form: a row of the form to rows of the kind. Where data fit several forms, the first is read."""


def _check_prompt(prompt: Any) -> None:
    if not _last_text(prompt):
        raise BadRowError("empty prompt")
    if not isinstance(prompt, str):
        if prompt[-1]["role"] == "system":
            raise BadRowError("a prompt without a user turn")
        _check_order(prompt)


def _check_answer(prompt: Any, completion: Any) -> None:
    _check_prompt(prompt)
    if not _last_text(completion):
        raise BadRowError("empty completion")
    if isinstance(prompt, str):
        return
    _check_order(prompt + completion)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise BadRowError("a prompt that does not end with a user turn")
    if completion[-1]["role"] != "assistant" or {message["role"] for message in completion} - {"assistant", "tool"}:
        raise BadRowError("a completion with turns that are not the assistant's")


def _check_order(messages: list[dict[str, str]]) -> None:
    """Check that roles are known and alternate.

    A system turn is first, and only the last turn may be empty.
    """
    previous = None
    for place, message in enumerate(messages):
        role = message["role"]
        if role not in ("system", "user", "assistant", "tool"):
            raise BadRowError(f"unknown role {role!r} (known are system, user, assistant, tool)")
        if role == "system" and place:
            raise BadRowError("a system turn that is not first")
        if role == previous and role != "tool":
            raise BadRowError("two turns of one role in a row")
        if role != "system" and place < len(messages) - 1 and not message["content"].strip():
            raise BadRowError("empty turn")
        previous = role


def _last_text(value: Any) -> str:
    """Return the text, or that of the last message, without surrounding space."""
    return (value if isinstance(value, str) else value[-1]["content"] if value else "").strip()


def _stripped(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    return repr([(message["role"], message["content"].strip()) for message in value])
