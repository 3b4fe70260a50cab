"""Unranked groups: a prompt and the completions that were sampled for it, one group on each line of a JSONL file.

    {"prompt": T, "completions": [T, T, ...], "sources": ["sft", "ppo", ...], "id": "..."}

`T` is text, or a list of messages `{"role": ..., "content": ...}`: of a prompt any that end with the user's turn, of a
completion one message of the assistant. There are 2 to 64 completions; one may be empty (a model that ended at once).
`sources` (optional) names for each completion who wrote it; no labeller sees it. `id` (optional) names the group; without it,
it is a hash of prompt and completions. Other columns are not read.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError

MOST_COMPLETIONS = 64
_ROLES = ("system", "user", "assistant", "tool")

Turns = str | list[dict[str, str]]
"""A text, or a list of messages with `role` and `content`."""


class _BadGroupError(Exception):
    """Why a row is no group."""


@dataclass(frozen=True)
class Group:
    """A prompt and K completions, all of them texts or all of them lists of messages.

    Parameters:
        id: what names the group, in files and stores.
        prompt: text, or messages.
        completions: K texts, or K lists of one message.
        sources: K names of who wrote them, or None.
    """

    id: str
    prompt: Turns
    completions: list[Turns]
    sources: list[str] | None = None

    @property
    def conversational(self) -> bool:
        """Whether prompt and completions are messages."""
        return not isinstance(self.prompt, str)

    def texts(self) -> list[str]:
        """What each completion says, without surrounding space: equal ones count as one."""
        return [(answer if isinstance(answer, str) else answer[0]["content"]).strip() for answer in self.completions]

    def comparable(self) -> bool:
        """Whether two completions at least are not empty and differ."""
        return len(set(self.texts()) - {""}) > 1

    def answer(self, text: str) -> Turns:
        """`text` as a completion of this group; of a prompt that is text, with the space that most completions begin with."""
        if self.conversational:
            return [{"role": "assistant", "content": text}]
        spaces = Counter(answer[: len(answer) - len(answer.lstrip())] for answer in self.completions if answer.strip())
        return (spaces.most_common(1)[0][0] if spaces else "") + text

    def row(self) -> dict[str, Any]:
        """The group as the row of a file."""
        row = {"id": self.id, "prompt": self.prompt, "completions": self.completions}
        return row | ({"sources": self.sources} if self.sources is not None else {})


def read_groups(path: Path) -> list[Group]:
    """The groups in a JSONL file; one that stands there twice counts once.

    Raises:
        RecipeError: if the file cannot be read or any row is not a group, with the row and what it should be.
    """
    groups: dict[str, Group] = {}
    rows: dict[str, int] = {}
    for number, row in read_rows(path):
        group = group_of(row, f"{path}: row {number}")
        first = groups.setdefault(group.id, group)
        if first.row() != group.row():
            raise RecipeError(f"{path}: row {number}: the id '{group.id}' stands in row {rows[group.id]} with other content")
        rows.setdefault(group.id, number)
        if group.conversational != next(iter(groups.values())).conversational:
            raise RecipeError(
                f"{path}: row {number}: some prompts are texts and some lists of messages: write all of them alike"
            )
    if not groups:
        raise RecipeError(f"{path}: the file has no rows")
    return list(groups.values())


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The number, from 1, and the content of each line of a JSONL file; empty lines are passed over.

    Raises:
        RecipeError: if there is no such file, or a line is not JSON.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(line, f"{path}: row {number}")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file (looked in {path.absolute().parent})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a JSONL file ({error})") from error


def group_of(row: Any, where: str) -> Group:
    """The group that a row of a file is.

    Args:
        row: what the line holds.
        where: file and row, for messages.

    Raises:
        RecipeError: if it is not one.
    """
    try:
        return _read_group(row)
    except _BadGroupError as problem:
        wanted = '{"prompt": text or messages, "completions": [two or more of them]}'
        raise RecipeError(
            f"{where}: {problem}. A row of sampled groups is {wanted}; docs/label.md has the whole shape"
        ) from None


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: not valid JSON ({error}); a file of groups has one JSON object on each line") from error


def _read_group(row: Any) -> Group:
    if not isinstance(row, dict):
        raise _BadGroupError(f"it holds a {type(row).__name__}, not a mapping")
    for key in ("prompt", "completions"):
        if key not in row:
            raise _BadGroupError(f"there is no `{key}`, only {', '.join(row) or 'nothing'}")
    completions = row["completions"]
    if not isinstance(completions, list) or not 2 <= len(completions) <= MOST_COMPLETIONS:
        raise _BadGroupError(f"`completions` is not a list of 2 to {MOST_COMPLETIONS}")
    sources = row.get("sources")
    if sources is not None and (not _is_list_of_texts(sources) or len(sources) != len(completions)):
        raise _BadGroupError(f"`sources` is not a list of {len(completions)} names, one for each completion")
    conversational = any(isinstance(value, list) for value in (row["prompt"], *completions))
    prompt = _turns(row["prompt"], "user", "prompt", conversational)
    answers = [_turns(answer, "assistant", f"completion {k}", conversational) for k, answer in enumerate(completions, 1)]
    _check_turns(prompt, answers)
    identity = row.get("id")
    if identity is None:
        identity = hashlib.sha256(json.dumps([prompt, answers]).encode()).hexdigest()[:16]
    if not isinstance(identity, str) or not identity or not _is_text(identity):
        raise _BadGroupError(f"`id` is {identity!r}, not a text")
    return Group(identity, prompt, answers, sources)


def _turns(value: Any, role: str, name: str, conversational: bool) -> Turns:
    """A text; or, where any of the row is a list of messages, a list of messages, in which a text is one of `role`."""
    if isinstance(value, str):
        if not _is_text(value):
            raise _BadGroupError(f"{name} is not text that UTF-8 can hold")
        return [{"role": role, "content": value}] if conversational else value
    if not isinstance(value, list) or not value:
        raise _BadGroupError(f"{name} is neither text nor a list of messages")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in _ROLES or not _is_text(message.get("content")):
            raise _BadGroupError(f"{name} has a message without a `role` ({', '.join(_ROLES)}) or without text as `content`")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _check_turns(prompt: Turns, answers: list[Turns]) -> None:
    last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if not last.strip():
        raise _BadGroupError("the prompt is empty")
    if isinstance(prompt, str):
        return
    roles = [message["role"] for message in prompt]
    if roles[-1] not in ("user", "tool"):
        raise _BadGroupError("the prompt does not end with a turn of the user")
    if "system" in roles[1:] or any(one == other != "tool" for one, other in itertools.pairwise(roles)):
        raise _BadGroupError("the prompt has a system turn that is not first, or two turns of one role in a row")
    for k, answer in enumerate(answers, 1):
        if [message["role"] for message in answer] != ["assistant"]:
            raise _BadGroupError(f"completion {k} is not one message of the assistant")


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_text(value: Any) -> bool:
    """Whether it is text, and without the lone surrogates that JSON may hold and neither SQLite nor a file can."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
