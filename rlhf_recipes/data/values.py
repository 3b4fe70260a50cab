"""Reading single values of a row: texts, conversations and numbers."""

import math
import re
from typing import Any

from trl import maybe_convert_to_chatml

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


class BadRowError(Exception):
    """Why a row cannot be used."""


def holds_messages(value: Any) -> bool:
    """Return whether a value is a message, a list of messages, or lists of those."""
    if isinstance(value, list):
        return holds_messages(next(filter(None, value), None))
    return isinstance(value, dict) and bool(value.keys() & {"role", "content", "from", "value"})


def is_transcript(value: Any) -> bool:
    """Return whether a value is a transcript in the format of HH-RLHF."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def read_text(value: Any, name: str) -> str:
    """Return a text, "" for a missing one."""
    if not isinstance(value, str | None):
        raise BadRowError(f"{name} is not text")
    return value or ""


def read_turns(value: Any, name: str, role: str, conversational: bool) -> Any:
    """Return a text; or, in conversational data, a list of messages.

    Args:
        value: of the row; in conversational data a text becomes one message of `role`.
        name: of the column, for errors.
        role: "user" or "assistant".
        conversational: whether the data are conversational.
    """
    if not conversational:
        return read_text(value, name)
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
    return {"role": _ROLES.get(message["role"], message["role"]), "content": content}


def read_conversation(value: Any, name: str) -> list[dict[str, str]]:
    """Return the messages of a list, or of a transcript of HH-RLHF."""
    if not isinstance(value, str):
        return read_turns(value, name, "assistant", conversational=True)
    if not is_transcript(value):
        raise BadRowError(f"{name} is not a transcript that begins with Human:")
    pieces = re.split(r"\n\n(Human|Assistant):", "\n\n" + value.strip())[1:]
    roles = ["user" if piece == "Human" else "assistant" for piece in pieces[::2]]
    if roles[-1] != "assistant":
        raise BadRowError("a transcript that does not end with an Assistant turn")
    return [{"role": role, "content": piece.strip()} for role, piece in zip(roles, pieces[1::2], strict=True)]


def read_number(value: Any, name: str) -> float:
    """Return a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRowError(f"{name} is not a finite number")
    return float(value)
