"""Reading the rows of a part: from the user's columns to a shape, and from there to what a stage trains on."""

import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.data.shapes import ACCEPTED, BATCH, SHAPES, Kind
from rlhf_recipes.data.sources import Part

import pyarrow
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from trl import extract_prompt, maybe_convert_to_chatml

logger = logging.getLogger(__name__)

_ANSWERS = {  # the columns that a shape reads besides the prompt's
    "preference": {"chosen", "rejected", "margin"},
    "ranking": {"responses", "completions", "ranks"},
    "completion": {"completion"},
    "messages": {"messages", "conversations"},
    "text": {"text"},
    "prompt": set(),
}
_SOURCE = Path(__file__).read_text(encoding="utf-8")  # what decides how rows are read
_PROBLEM, _ROW = "__problem__", "__row__"
_ROLES = {"human": "user", "gpt": "assistant"}  # the names of ShareGPT
_TEXT = Value("string")
_MESSAGES = List({"role": _TEXT, "content": _TEXT})


@dataclass(frozen=True)
class Converted:
    """A part in the columns of a kind. `bad` lists (row number, reason)."""

    label: str
    dataset: Dataset
    read: int
    bad: list[tuple[int, str]]
    unused: list[str]
    conversational: bool

    def report(self) -> dict[str, Any]:
        """What became of the part, JSON-serialisable."""
        return {
            "source": self.label,
            "read": self.read,
            "dropped": dict(Counter(reason for _, reason in self.bad)),
            "rows": len(self.dataset),
            "unused_columns": self.unused,
        }


class _BadRowError(Exception):
    """Why a row cannot be used."""


def convert(part: Part, kind: Kind) -> Converted:
    """Read every row of a part into the columns of `kind`; bad rows are taken out and listed."""
    shape, columns = shape_of(part, kind), part.dataset.column_names
    if own := {_ROW, _PROBLEM} & {*columns}:
        raise RecipeError(f"{part.label}: the column `{own.pop()}` has a name of ours: give it another with `column_mapping`")
    if kind == "ranking" and "margin" in columns:
        raise RecipeError(
            f"{part.label}: rankings have no `margin`: set `train_on: pairs` to use the column, or leave it out with `columns`"
        )
    used = _used_columns(shape, columns)
    conversational = _is_conversational(part.dataset.select_columns(used), shape)
    spare = [column for column in columns if column not in used]
    extras = [column for column in spare if column != "prompt"] if kind == "prompt" else []
    features = _features(kind, shape, conversational, used)
    features |= {column: part.dataset.features[column] for column in extras}

    def convert(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = []
        for place, index in enumerate(indices):
            kept = {column: batch[column][place] for column in extras} | {_ROW: index + 1}
            try:
                row = _READERS[shape]({column: batch[column][place] for column in used}, conversational)
                rows += [made | kept for made in _CONVERTERS[kind](row)]
            except _BadRowError as problem:
                rows.append({_PROBLEM: str(problem)} | kept)
        return {column: [row.get(column) for row in rows] for column in features}

    _warn_of_ignored_keys(part, used)
    try:
        made = part.dataset.map(
            convert,
            batched=True,
            batch_size=BATCH,
            with_indices=True,
            remove_columns=columns,
            features=Features(features),
            # `datasets` does not see when the functions called here change, and TRL's own caches go by this fingerprint
            new_fingerprint=Hasher.hash((part.dataset._fingerprint, kind, shape, conversational, _SOURCE)),
            load_from_cache_file=False,
            desc=f"Reading {part.label}",
        )
    except pyarrow.ArrowException as error:  # for columns that it reads and cannot write
        raise RecipeError(
            f"{part.label}: its columns cannot be kept: {first_line(error)}: list those that are needed in `columns`"
        ) from error
    problems = list(made[_PROBLEM])
    bad = [(row, reason) for row, reason in zip(made[_ROW], problems, strict=True) if reason]
    if bad:
        made = made.select([index for index, reason in enumerate(problems) if not reason])
    return Converted(
        label=part.label,
        dataset=made.remove_columns([_ROW, _PROBLEM]),
        read=len(part.dataset),
        bad=bad,
        unused=[column for column in spare if column not in extras],
        conversational=conversational,
    )


def _warn_of_ignored_keys(part: Part, used: list[str]) -> None:
    """Says which keys of messages are not read, such as a model's reasoning or weights of turns; the first rows tell."""
    first = part.dataset.select(range(min(BATCH, len(part.dataset))))
    lists = [value for column in used for value in first[column] if isinstance(value, list)]
    messages = [message for value in lists for message in value if isinstance(message, dict)]
    keys = {key for message in messages if message.keys() & {"role", "from"} for key, value in message.items() if value}
    ignored = keys - {"role", "content", "from", "value", "tool_calls"}
    if ignored:
        logger.warning("%s: of the messages, %s is not used", part.label, ", ".join(sorted(ignored)))


def shape_of(part: Part, kind: Kind) -> str:
    """The shape that the columns of a part make, of those that `kind` can be made of.

    Raises:
        RecipeError: if they make none, or there are no rows.
    """
    if not len(part.dataset):
        raise RecipeError(f"{part.label} has no rows.")
    columns = set(part.dataset.column_names)
    for shape in ACCEPTED[kind]:
        if any(columns.issuperset(needed) for needed in SHAPES[shape]):
            return shape
    wanted = "; ".join(" + ".join(needed) for shape in ACCEPTED[kind] for needed in SHAPES[shape])
    hint = " To prompt with the texts, set `column_mapping: {text: prompt}`." if kind == "prompt" and "text" in columns else ""
    raise RecipeError(
        f"{part.label}: the columns are {', '.join(part.dataset.column_names)}, but a stage on {kind} data needs one of: "
        f"{wanted}. Rename columns with `column_mapping`.{hint}"
    )


def _used_columns(shape: str, columns: list[str]) -> list[str]:
    """The columns that are read: those of the answers, and `prompt`, or without it what stands for a prompt."""
    # `instruction` and `output`, whatever is in a `prompt` beside them
    whole = shape == "completion" and "completion" not in columns
    asked = "prompt" in columns and not whole
    question = {"prompt"} if asked else {"instruction", "input", "output"} if "instruction" in columns else set()
    used = _ANSWERS[shape] | (question if shape not in ("messages", "text") else set())
    return [column for column in columns if column in used]


def _is_conversational(dataset: Dataset, shape: str) -> bool:
    """Whether the rows become lists of messages: judged by the first value of each column that says so."""
    columns = dataset.column_names
    if shape in ("messages", "text"):
        return shape == "messages"
    if "prompt" not in columns and "instruction" in columns:
        return True
    for column in ("prompt", "completion", "chosen", "rejected", "completions"):
        first = next(filter(None, dataset[column]), None) if column in columns else None
        if column == "completions":  # a list of answers, which are texts or themselves lists of messages
            first = next(filter(None, first), None) if isinstance(first, list) else None
        if isinstance(first, list) or (column == "chosen" and "prompt" not in columns and _is_transcript(first)):
            return True
    return False


def _features(kind: Kind, shape: str, conversational: bool, used: list[str]) -> dict[str, Any]:
    turn = _MESSAGES if conversational else _TEXT
    features: dict[str, Any] = {_ROW: Value("int64"), _PROBLEM: _TEXT}
    if kind == "ranking":
        return features | {"prompt": turn, "completions": List(turn), "ranks": List(Value("float64"))}
    if kind == "preference":
        margin = {"margin": Value("float64")} if "margin" in used else {}
        return features | {"prompt": turn, "chosen": turn, "rejected": turn} | margin
    if kind == "prompt":
        return features | {"prompt": turn} | ({"reference": _TEXT} if shape in ("completion", "messages") else {})
    return features | ({shape: turn} if shape in ("messages", "text") else {"prompt": turn, "completion": turn})


def _read_preference(row: dict[str, Any], conversational: bool) -> dict[str, Any]:
    explicit = "prompt" in row or "instruction" in row
    if explicit or not conversational:
        chosen, rejected = (_turns(row[side], side, "assistant", conversational) for side in ("chosen", "rejected"))
    else:
        chosen, rejected = (_conversation(row[side], side) for side in ("chosen", "rejected"))
    whole = conversational and all(side and side[0]["role"] != "assistant" for side in (chosen, rejected))
    if explicit and not whole:
        pair = {"prompt": _prompt(row, conversational), "chosen": chosen, "rejected": rejected}
    else:  # both sides begin with the prompt, also in data sets that repeat it in `prompt`
        pair = _split_pair(chosen, rejected)
    return pair | ({"margin": _number(row["margin"], "margin")} if "margin" in row else {})


def _split_pair(chosen: Any, rejected: Any) -> dict[str, Any]:
    """Take the common beginning of two texts or conversations as the prompt, of texts up to a whole word."""
    if not chosen or not rejected:
        raise _BadRowError("empty completion")
    if isinstance(chosen, str) and chosen == rejected:
        raise _BadRowError("chosen equal to rejected")
    if chosen[0] != rejected[0]:
        raise _BadRowError("chosen and rejected without a common prompt")
    pair = extract_prompt({"chosen": chosen, "rejected": rejected})
    sides = pair["chosen"][:1], pair["rejected"][:1]
    if isinstance(chosen, str) and not pair["prompt"][-1:].isspace() and not all(side.isspace() for side in sides):
        cut = re.search(r"[ ]?\S*$", pair["prompt"]).start()  # TRL cuts at the first letter that differs: "bl" + "ue", "ack"
        return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
    return pair


def _read_ranking(row: dict[str, Any], conversational: bool) -> dict[str, Any]:
    if "responses" in row:
        responses = row["responses"] or []
        if not isinstance(responses, list) or not all(isinstance(response, dict) for response in responses):
            raise _BadRowError("responses are not a list of {text, rank}")
        completions, ranks = ([response.get(key) for response in responses] for key in ("text", "rank"))
    else:
        completions, ranks = (row[key] if isinstance(row[key], list) else [] for key in ("completions", "ranks"))
    if len(completions) < 2:
        raise _BadRowError("fewer than two completions")
    if len(ranks) != len(completions):
        raise _BadRowError("ranks of other length than completions")
    return {
        "prompt": _prompt(row, conversational),
        "completions": [_turns(completion, "completion", "assistant", conversational) for completion in completions],
        "ranks": [_number(rank, "rank") for rank in ranks],
    }


def _read_completion(row: dict[str, Any], conversational: bool) -> dict[str, Any]:
    completion = row["completion"] if "completion" in row else row["output"]
    return {
        "prompt": _prompt(row, conversational),
        "completion": _turns(completion, "completion", "assistant", conversational),
    }


def _read_messages(row: dict[str, Any], conversational: bool) -> dict[str, Any]:
    return {"messages": _turns(maybe_convert_to_chatml(row)["messages"], "messages", "user", conversational)}


def _read_text(row: dict[str, Any], conversational: bool) -> dict[str, Any]:
    return {"text": _turns(row["text"], "text", "user", conversational)}


def _read_prompt(row: dict[str, Any], conversational: bool) -> dict[str, Any]:
    return {"prompt": _prompt(row, conversational)}


_READERS: dict[str, Callable[[dict[str, Any], bool], dict[str, Any]]] = {
    "preference": _read_preference,
    "ranking": _read_ranking,
    "completion": _read_completion,
    "messages": _read_messages,
    "text": _read_text,
    "prompt": _read_prompt,
}


def _prompt(row: dict[str, Any], conversational: bool) -> Any:
    """`prompt`, or the question that `instruction` and `input` make, as a conversation."""
    if "prompt" in row:
        return _turns(row["prompt"], "prompt", "user", conversational)
    instruction, more = (_turns(row.get(key), key, "user", False) for key in ("instruction", "input"))
    if not instruction.strip():
        raise _BadRowError("empty prompt")
    return [{"role": "user", "content": f"{instruction}\n{more}" if more.strip() else instruction}]


def _turns(value: Any, name: str, role: str, conversational: bool) -> Any:
    """A text; or, in conversational data, a list of messages, where a text is one message of `role`."""
    if value is None:
        value = ""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if conversational else value
    if not conversational:
        raise _BadRowError(f"{name} is not text")
    if not isinstance(value, list):
        raise _BadRowError(f"{name} is neither text nor a list of messages")
    return [_message(message, name) for message in maybe_convert_to_chatml({"messages": value})["messages"]]


def _message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _BadRowError(f"{name} with a message that has no role")
    if message.get("tool_calls"):
        raise _BadRowError(f"{name} with tool calls, which are not supported")
    content = message.get("content") or ""
    if not isinstance(content, str):
        raise _BadRowError(f"{name} with a message that is not text")
    return {"role": _ROLES.get(message["role"], message["role"]), "content": content}


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def _conversation(value: Any, name: str) -> list[dict[str, str]]:
    """A conversation, given as a list of messages or as a transcript of HH-RLHF."""
    if not isinstance(value, str):
        return _turns(value, name, "assistant", conversational=True)
    if not _is_transcript(value):
        raise _BadRowError(f"{name} is not a transcript that begins with Human:")
    pieces = re.split(r"\n\n(Human|Assistant):", "\n\n" + value.strip())[1:]
    roles = ["user" if piece == "Human" else "assistant" for piece in pieces[::2]]
    if roles[-1] != "assistant":
        raise _BadRowError("a transcript that does not end with an Assistant turn")
    return [{"role": role, "content": piece.strip()} for role, piece in zip(roles, pieces[1::2], strict=True)]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _BadRowError(f"{name} is not a finite number")
    return float(value)


def _sft_rows(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "text" in row:
        if not row["text"].strip():
            raise _BadRowError("empty text")
        return [row]
    if "messages" in row:
        _check_order(row["messages"])
        if not row["messages"] or row["messages"][-1]["role"] != "assistant":
            raise _BadRowError("messages that do not end with an assistant turn")
        if not _last_text(row["messages"]):
            raise _BadRowError("empty completion")
        return [row]
    if "completions" in row:
        best = row["completions"][row["ranks"].index(min(row["ranks"]))]
    else:
        best = row["completion"] if "completion" in row else row["chosen"]
    _check_answer(row["prompt"], best)
    return [{"prompt": row["prompt"], "completion": best}]


def _preference_rows(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "chosen" in row:
        _check_pair(row)
        return [row]
    _check_ranking(row)
    ranked = zip(row["ranks"], row["completions"], strict=True)
    pairs = (sorted(pair, key=lambda entry: entry[0]) for pair in itertools.combinations(ranked, 2))
    return [
        {"prompt": row["prompt"], "chosen": better, "rejected": worse} for (low, better), (high, worse) in pairs if low < high
    ]


def _ranking_rows(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "completions" in row:
        _check_ranking(row)
        return [row]
    _check_pair(row)
    return [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "ranks": [0.0, 1.0]}]


def _prompt_rows(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages" in row:
        answers = [place for place, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        if not answers:
            raise _BadRowError("messages without an assistant turn")
        row = {"prompt": row["messages"][: answers[-1]], "completion": row["messages"][answers[-1] :][:1]}
    prompt = row["prompt"]
    _check_prompt(prompt)
    if "completion" not in row:
        return [{"prompt": prompt}]
    reference = _last_text(row["completion"])
    if not reference:
        raise _BadRowError("empty completion")
    return [{"prompt": prompt, "reference": reference}]


_CONVERTERS: dict[Kind, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    "sft": _sft_rows,
    "preference": _preference_rows,
    "ranking": _ranking_rows,
    "prompt": _prompt_rows,
}


def _check_prompt(prompt: Any) -> None:
    if not _last_text(prompt):
        raise _BadRowError("empty prompt")
    if not isinstance(prompt, str):
        if prompt[-1]["role"] == "system":
            raise _BadRowError("a prompt without a user turn")
        _check_order(prompt)


def _check_answer(prompt: Any, completion: Any) -> None:
    _check_prompt(prompt)
    if not _last_text(completion):
        raise _BadRowError("empty completion")
    if isinstance(prompt, str):
        return
    _check_order(prompt + completion)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise _BadRowError("a prompt that does not end with a user turn")
    if completion[-1]["role"] != "assistant" or {message["role"] for message in completion} - {"assistant", "tool"}:
        raise _BadRowError("a completion with turns that are not the assistant's")


def _check_pair(row: dict[str, Any]) -> None:
    if _stripped(row["chosen"]) == _stripped(row["rejected"]):
        raise _BadRowError("chosen equal to rejected")
    _check_answer(row["prompt"], row["chosen"])
    _check_answer(row["prompt"], row["rejected"])


def _check_ranking(row: dict[str, Any]) -> None:
    for completion in row["completions"]:
        _check_answer(row["prompt"], completion)
    if len(set(row["ranks"])) == 1:
        raise _BadRowError("all completions tie")
    ranks: dict[str, float] = {}
    for completion, rank in zip(row["completions"], row["ranks"], strict=True):
        if ranks.setdefault(_stripped(completion), rank) != rank:
            raise _BadRowError("equal completions of different rank")


def _check_order(messages: list[dict[str, str]]) -> None:
    """Known roles, at most one system turn and that first, no role twice in a row, no empty turn before the last."""
    before = None
    for place, message in enumerate(messages):
        role = message["role"]
        if role not in ("system", "user", "assistant", "tool"):
            raise _BadRowError(f"unknown role {role!r} (known are system, user, assistant, tool)")
        if role == "system" and place:
            raise _BadRowError("a system turn that is not first")
        if role == before and role != "tool":
            raise _BadRowError("two turns of one role in a row")
        if role != "system" and place < len(messages) - 1 and not message["content"].strip():
            raise _BadRowError("empty turn")
        before = role


def _last_text(value: Any) -> str:
    """The text, or that of the last message, without surrounding space; "" where there is none."""
    if isinstance(value, str):
        return value.strip()
    return value[-1]["content"].strip() if value else ""


def _stripped(value: Any) -> str:
    return (
        value.strip() if isinstance(value, str) else repr([(message["role"], message["content"].strip()) for message in value])
    )
