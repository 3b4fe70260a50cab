"""The shapes that data may have, and how a row of each is read.

To support another shape, add an entry to `SHAPES`. Its `read` returns one of the six forms; `conversion` has what every stage
makes of a form.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from trl import extract_prompt, maybe_convert_to_chatml

Row = dict[str, Any]

Form = Literal["preference", "ranking", "completion", "prompt", "messages", "text"]
"""What a row is read into. `T` is text or, in conversational data, a list of messages:

- `"preference"`: `prompt: T, chosen: T, rejected: T`, and `margin: float` where the data have it
- `"ranking"`: `prompt: T, completions: list[T], ranks: list[float]` (lower is better)
- `"completion"`: `prompt: T, completion: T`
- `"prompt"`: `prompt: T`
- `"messages"`: `messages: list[message]`
- `"text"`: `text: str`
"""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_LIST_COLUMNS = ("messages", "conversations", "completions", "ranks", "responses", "history")
_BEGINS_MESSAGE = re.compile(r"\s*(?:array\()?(?:\[\s*)?\{")
_MESSAGE_KEYS = (("role", "content"), ("from", "value"))


class BadRowError(Exception):
    """Why a row cannot be used."""


def holds_messages(value: Any) -> bool:
    """Return whether a value is a message, a list of messages, or lists of those."""
    if isinstance(value, list):
        return holds_messages(next(filter(None, value), None))
    return isinstance(value, dict) and bool(value.keys() & {"role", "content", "from", "value"})


def is_list_as_text(value: Any, column: str) -> bool:
    """Return whether a value is a list or a message written as text, or holds one."""
    if isinstance(value, list):  # of completions, or of responses
        return any(is_list_as_text(item.get("text") if isinstance(item, dict) else item, "") for item in value)
    if not isinstance(value, str) or not value.strip():
        return False
    if column in _LIST_COLUMNS or not _BEGINS_MESSAGE.match(value):
        return column in _LIST_COLUMNS
    try:
        parsed = json.loads(value)
        first = parsed[0] if isinstance(parsed, list) else parsed
    except (ValueError, RecursionError):  # as Python or NumPy write it
        first = re.findall(r"['\"](\w+)['\"]\s*:", value)
    return any(role in first and text in first for role, text in _MESSAGE_KEYS)


def parse_lists(value: Any, name: str, column: str) -> Any:
    """Return a value in which lists that are written as text are read, as JSON."""
    if isinstance(value, str) and is_list_as_text(value, column):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, list | dict):
            raise BadRowError(f"{name} is a list written as text, but not as JSON: save the file as JSON lines or Parquet")
    if isinstance(value, list) and is_list_as_text(value, column):
        return [parse_lists(item, name, "") for item in value]
    if isinstance(value, dict) and "text" in value:  # a response
        return value | {"text": parse_lists(value["text"], name, "")}
    return value


@dataclass(frozen=True)
class Shape:
    """Columns that data may have, and how a row of them is read.

    Parameters:
        form: the form that `read` returns.
        columns: the columns that identify the shape.
        read: called with a row and whether the data are conversational; raises BadRowError.
        optional: further columns that `read` uses where the data have them.
        conversational: whether the data are conversational, or how the values of one of `columns` show it.
    """

    form: Form
    columns: tuple[str, ...]
    read: Callable[[Row, bool], Row]
    optional: tuple[str, ...] = ()
    conversational: bool | Callable[[Any], bool] = holds_messages


def read_turns(value: Any, name: str, role: str, conversational: bool) -> Any:
    """Return a text; or, in conversational data, a list of messages.

    Args:
        value: of the row; in conversational data a text becomes one message of `role`.
        name: of the column, for errors.
        role: "user" or "assistant".
        conversational: whether the data are conversational.
    """
    if not conversational:
        return _read_text(value, name)
    if isinstance(value, str | None):
        return [{"role": role, "content": value or ""}]
    if not isinstance(value, list):
        raise BadRowError(f"{name} is neither text nor a list of messages")
    return [_read_message(message, name) for message in maybe_convert_to_chatml({"messages": value})["messages"]]


def _read_message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRowError(f"{name} with a message that has no role")
    if message.get("tool_calls"):
        raise BadRowError(f"{name} with tool calls, which are not supported")
    content = message.get("content") or ""
    if not isinstance(content, str):
        raise BadRowError(f"{name} with a message that is not text")
    return {"role": _SHAREGPT_ROLES.get(message["role"], message["role"]), "content": content}


def add_system(row: Row, system: Any) -> Row:
    """Put the text of a column `system` before a conversation."""
    system, place = _read_text(system, "system"), "messages" if "messages" in row else "prompt"
    if not system.strip():
        return row
    turns = row[place]
    if turns and turns[0]["role"] == "system":
        if turns[0]["content"].strip() not in ("", system.strip()):
            raise BadRowError("a system turn beside another text in the column system")
        turns = turns[1:]
    return row | {place: [{"role": "system", "content": system}, *turns]}


def _read_text(value: Any, name: str) -> str:
    if not isinstance(value, str | None):
        raise BadRowError(f"{name} is not text")
    return value or ""


def _read_number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRowError(f"{name} is not a finite number")
    return float(value)


def is_transcript(value: Any) -> bool:
    """Return whether a value is a text in the format of HH-RLHF."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def _is_conversation(value: Any) -> bool:
    return holds_messages(value) or is_transcript(value)


def _read_conversation(value: Any, name: str) -> list[dict[str, str]]:
    """Return the messages of a list, or of a transcript in the format of HH-RLHF."""
    if not isinstance(value, str):
        return read_turns(value, name, "assistant", conversational=True)
    if not is_transcript(value):
        raise BadRowError(f"{name} is not a transcript that begins with Human:")
    pieces = re.split(r"\n\n(Human|Assistant):", "\n\n" + value.strip())[1:]
    roles = ["user" if piece == "Human" else "assistant" for piece in pieces[::2]]
    if roles[-1] != "assistant":
        raise BadRowError("a transcript that does not end with an Assistant turn")
    return [{"role": role, "content": piece.strip()} for role, piece in zip(roles, pieces[1::2], strict=True)]


def _read_prompt(row: Row, conversational: bool) -> Row:
    """Read `prompt`, or Alpaca's `instruction` and `input`, after its `history`."""
    if "prompt" in row:
        return {"prompt": read_turns(row["prompt"], "prompt", "user", conversational)}
    instruction, context = (_read_text(row.get(key), key) for key in ("instruction", "input"))
    if not instruction.strip():
        raise BadRowError("empty prompt")
    question = {"role": "user", "content": f"{instruction}\n{context}" if context.strip() else instruction}
    return {"prompt": [*_read_history(row.get("history") or []), question]}


def _read_history(history: Any) -> list[dict[str, str]]:
    if holds_messages(history):
        return read_turns(history, "history", "user", conversational=True)
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRowError("history is not a list of pairs of a question and its answer")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": _read_text(text, "history")}
        for pair in history
        for role, text in zip(roles, pair, strict=True)
    ]


def _read_completion(row: Row, conversational: bool) -> Row:
    completion = row["completion"] if "completion" in row else row["output"]
    return _read_prompt(row, conversational) | {"completion": read_turns(completion, "completion", "assistant", conversational)}


def _read_pair(row: Row, conversational: bool) -> Row:
    sides = {side: read_turns(row[side], side, "assistant", conversational) for side in ("chosen", "rejected")}
    if conversational and all(side and side[0]["role"] != "assistant" for side in sides.values()):
        return _split_pair(**sides) | _read_margin(row)  # both sides repeat the prompt
    return _read_prompt(row, conversational) | sides | _read_margin(row)


def _read_pair_without_prompt(row: Row, conversational: bool) -> Row:
    read = _read_conversation if conversational else _read_text
    return _split_pair(read(row["chosen"], "chosen"), read(row["rejected"], "rejected")) | _read_margin(row)


def _split_pair(chosen: Any, rejected: Any) -> Row:
    """Take the common beginning of two texts or conversations as the prompt."""
    if not chosen or not rejected:
        raise BadRowError("empty completion")
    if isinstance(chosen, str) and chosen == rejected:
        raise BadRowError("chosen equal to rejected")
    if chosen[0] != rejected[0]:
        raise BadRowError("chosen and rejected without a common prompt")
    pair = extract_prompt({"chosen": chosen, "rejected": rejected})
    sides = pair["chosen"][:1], pair["rejected"][:1]
    if isinstance(chosen, str) and not pair["prompt"][-1:].isspace() and not all(side.isspace() for side in sides):
        cut = re.search(r"[ ]?\S*$", pair["prompt"]).start()  # TRL cuts "blue" and "black" after "bl"
        return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
    return pair


def _read_margin(row: Row) -> Row:
    return {"margin": _read_number(row["margin"], "margin")} if "margin" in row else {}


def _read_ranking(row: Row, conversational: bool) -> Row:
    completions, ranks = (row[key] if isinstance(row[key], list) else [] for key in ("completions", "ranks"))
    if len(completions) < 2:
        raise BadRowError("fewer than two completions")
    if len(ranks) != len(completions):
        raise BadRowError("ranks of other length than completions")
    return _read_prompt(row, conversational) | {
        "completions": [read_turns(completion, "completion", "assistant", conversational) for completion in completions],
        "ranks": [_read_number(rank, "rank") for rank in ranks],
    }


def _read_responses(row: Row, conversational: bool) -> Row:
    responses = row["responses"] or []
    if not isinstance(responses, list) or not all(isinstance(response, dict) for response in responses):
        raise BadRowError("responses are not a list of {text, rank}")
    completions, ranks = ([response.get(key) for response in responses] for key in ("text", "rank"))
    return _read_ranking(row | {"completions": completions, "ranks": ranks}, conversational)


def _read_messages(row: Row, conversational: bool) -> Row:
    (messages,) = row.values()
    return {"messages": read_turns(messages, "messages", "user", conversational)}


def _read_plain_text(row: Row, conversational: bool) -> Row:
    return {"text": _read_text(row["text"], "text")}


SHAPES = (
    Shape("preference", ("prompt", "chosen", "rejected"), _read_pair, ("margin",)),
    Shape("preference", ("instruction", "chosen", "rejected"), _read_pair, ("input", "output", "history", "margin"), True),
    Shape("preference", ("chosen", "rejected"), _read_pair_without_prompt, ("margin",), _is_conversation),
    Shape("ranking", ("prompt", "responses"), _read_responses),
    Shape("ranking", ("prompt", "completions", "ranks"), _read_ranking),
    Shape("completion", ("prompt", "completion"), _read_completion),
    Shape("completion", ("instruction", "output"), _read_completion, ("input", "history"), True),
    Shape("prompt", ("prompt",), _read_prompt),
    Shape("prompt", ("instruction",), _read_prompt, ("input", "history"), True),
    Shape("messages", ("conversations",), _read_messages, conversational=True),
    Shape("messages", ("messages",), _read_messages, conversational=True),
    Shape("text", ("text",), _read_plain_text, conversational=False),
)
"""The supported shapes. Where data fit several of one form, the first is read."""
