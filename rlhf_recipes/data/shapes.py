"""The shapes that data may have, and how a row of each is read.

To support another shape, add an entry to `SHAPES`. Its `read` returns one of the six forms; what every stage makes of a form
is in `conversion`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_recipes.data.values import (
    BadRowError,
    holds_messages,
    is_transcript,
    read_conversation,
    read_number,
    read_text,
    read_turns,
)

from trl import extract_prompt

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


@dataclass(frozen=True)
class Shape:
    """Columns that data may have, and how a row of them is read.

    Parameters:
        form: the form that `read` returns.
        columns: the columns that identify the shape.
        read: called with a row and whether the data are conversational; raises BadRowError.
        optional: further columns that `read` uses where the data have them.
        conversational: whether the data are conversational, or how the first value of one of `columns` shows it.
    """

    form: Form
    columns: tuple[str, ...]
    read: Callable[[Row, bool], Row]
    optional: tuple[str, ...] = ()
    conversational: bool | Callable[[Any], bool] = holds_messages


def _read_prompt(row: Row, conversational: bool) -> Row:
    """Read `prompt`, or the question that `instruction` and `input` make."""
    if "prompt" in row:
        return {"prompt": read_turns(row["prompt"], "prompt", "user", conversational)}
    instruction, context = (read_text(row.get(key), key) for key in ("instruction", "input"))
    if not instruction.strip():
        raise BadRowError("empty prompt")
    return {"prompt": [{"role": "user", "content": f"{instruction}\n{context}" if context.strip() else instruction}]}


def _read_completion(row: Row, conversational: bool) -> Row:
    completion = row["completion"] if "completion" in row else row["output"]
    return _read_prompt(row, conversational) | {"completion": read_turns(completion, "completion", "assistant", conversational)}


def _read_pair(row: Row, conversational: bool) -> Row:
    sides = {side: read_turns(row[side], side, "assistant", conversational) for side in ("chosen", "rejected")}
    if conversational and all(side and side[0]["role"] != "assistant" for side in sides.values()):
        return _split_pair(**sides) | _read_margin(row)  # both sides repeat the prompt
    return _read_prompt(row, conversational) | sides | _read_margin(row)


def _read_pair_without_prompt(row: Row, conversational: bool) -> Row:
    read = read_conversation if conversational else read_text
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
    return {"margin": read_number(row["margin"], "margin")} if "margin" in row else {}


def _read_ranking(row: Row, conversational: bool) -> Row:
    completions, ranks = (row[key] if isinstance(row[key], list) else [] for key in ("completions", "ranks"))
    if len(completions) < 2:
        raise BadRowError("fewer than two completions")
    if len(ranks) != len(completions):
        raise BadRowError("ranks of other length than completions")
    return _read_prompt(row, conversational) | {
        "completions": [read_turns(completion, "completion", "assistant", conversational) for completion in completions],
        "ranks": [read_number(rank, "rank") for rank in ranks],
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


def _read_text(row: Row, conversational: bool) -> Row:
    return {"text": read_text(row["text"], "text")}


def _begins_conversation(value: Any) -> bool:
    return holds_messages(value) or is_transcript(value)


SHAPES = (
    Shape("preference", ("prompt", "chosen", "rejected"), _read_pair, ("margin",)),
    Shape("preference", ("instruction", "chosen", "rejected"), _read_pair, ("input", "output", "margin"), True),
    Shape("preference", ("chosen", "rejected"), _read_pair_without_prompt, ("margin",), _begins_conversation),
    Shape("ranking", ("prompt", "responses"), _read_responses),
    Shape("ranking", ("prompt", "completions", "ranks"), _read_ranking),
    Shape("completion", ("prompt", "completion"), _read_completion),
    Shape("completion", ("instruction", "output"), _read_completion, ("input",), True),
    Shape("prompt", ("prompt",), _read_prompt),
    Shape("prompt", ("instruction",), _read_prompt, ("input",), True),
    Shape("messages", ("conversations",), _read_messages, conversational=True),
    Shape("messages", ("messages",), _read_messages, conversational=True),
    Shape("text", ("text",), _read_text, conversational=False),
)
"""The supported shapes. Where data fit several of one form, the first is read."""
