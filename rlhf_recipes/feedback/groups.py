"""Groups of a prompt and its sampled completions, in JSONL files.

One group a line:

    {"prompt": T, "completions": [T, T, ...], "sources": ["sft", "ppo", ...], "id": "..."}

`T` is text or a list of messages `{"role": ..., "content": ...}`. A prompt ends with the user's turn. A completion is one
message of the assistant and may be empty. A group has 2 to 64 completions. `sources` (optional) names the policy that wrote
each completion; labellers never see it. `id` (optional) defaults to a hash of prompt and completions. Reward functions get the
other columns.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from rlhf_recipes.config.sample import MAX_COMPLETIONS
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import SAMPLED, read_json
from rlhf_recipes.generation.eos import warn_of_endless
from rlhf_recipes.inputs import require_groups

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

GROUPS = "groups.jsonl"

Turns = str | list[dict[str, str]]
"""A text, or a list of messages with `role` and `content`."""


@dataclass(frozen=True)
class Group:
    """A prompt and K completions, all of them texts or all of them lists of messages.

    `sources` names the policy that wrote each completion. `columns` are the other columns of the row, for reward functions.
    """

    id: str
    prompt: Turns
    completions: list[Turns]
    sources: list[str] | None = None
    columns: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def conversational(self) -> bool:
        """Whether prompt and completions are messages."""
        return not isinstance(self.prompt, str)

    def texts(self) -> list[str]:
        """Return the stripped texts of the completions. Equal texts count as one."""
        return [(answer if isinstance(answer, str) else answer[0]["content"]).strip() for answer in self.completions]

    def comparable(self) -> bool:
        """Return whether at least two completions are not empty and differ."""
        return len(set(self.texts()) - {""}) > 1

    def completion(self, text: str) -> Turns:
        """Return `text` in the form of this group's completions.

        After a plain prompt it starts with the white space that most completions start with.
        """
        if self.conversational:
            return [{"role": "assistant", "content": text}]
        spaces = Counter(answer[: len(answer) - len(answer.lstrip())] for answer in self.completions if answer.strip())
        return (spaces.most_common(1)[0][0] if spaces else "") + text

    def row(self) -> dict[str, Any]:
        """Return the group as a row of a file, without `columns`."""
        row = {"id": self.id, "prompt": self.prompt, "completions": self.completions}
        return row | ({"sources": self.sources} if self.sources is not None else {})


# --- Reading ----------------------------------------------------------------------------------------------------------


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: Literal["system", "user", "assistant", "tool"]
    content: str


_Turns = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[_Message], Field(min_length=1), Tag("messages")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "messages"),
]


class GroupRow(BaseModel):
    """The schema of a row. Pydantic rejects JSON text that UTF-8 cannot hold."""

    model_config = ConfigDict(strict=True, extra="allow")
    prompt: _Turns
    completions: list[_Turns] = Field(min_length=2, max_length=MAX_COMPLETIONS)
    sources: list[str] | None = None
    id: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sources is not None and len(self.sources) != len(self.completions):
            raise ValueError(f"sources: {len(self.sources)} names for {len(self.completions)} completions")
        prompt, answers = self._turns()
        if not (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip():
            raise ValueError("prompt: is empty")
        if isinstance(prompt, str):
            return self
        roles = [message["role"] for message in prompt]
        if roles[-1] not in ("user", "tool"):
            raise ValueError(f"prompt: ends with a turn of the {roles[-1]}, not of the user")
        if "system" in roles[1:] or any(one == other != "tool" for one, other in itertools.pairwise(roles)):
            raise ValueError("prompt: a system turn that is not first, or two turns in a row by one role")
        if any([message["role"] for message in answer] != ["assistant"] for answer in answers):
            raise ValueError("completions: each must be one message of the assistant")
        return self

    def _turns(self) -> tuple[Turns, list[Turns]]:
        """Return prompt and completions, as messages if any of them is."""
        conversational = any(isinstance(value, list) for value in (self.prompt, *self.completions))

        def convert(value: str | list[_Message], role: str) -> Turns:
            if isinstance(value, str):
                return [{"role": role, "content": value}] if conversational else value
            return [message.model_dump() for message in value]

        return convert(self.prompt, "user"), [convert(answer, "assistant") for answer in self.completions]

    def group(self) -> Group:
        """Return the group of this row."""
        prompt, answers = self._turns()
        identity = self.id or hashlib.sha256(json.dumps([prompt, answers]).encode()).hexdigest()[:16]
        return Group(identity, prompt, answers, self.sources, self.model_extra or {})


Row = TypeVar("Row", bound=BaseModel)


def read_rows(path: Path, schema: type[Row]) -> Iterator[tuple[str, Row]]:
    """Yield place (`FILE: row N`) and content of each row of a JSONL file.

    Raises:
        RecipeError: if the file cannot be read or a row does not match the schema.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}: row {number}"
                try:
                    if line.strip():
                        yield where, schema.model_validate_json(line)
                except ValidationError as error:
                    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
                    problem = ": ".join([".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")])
                    problem = problem.removeprefix(": ")
                    raise RecipeError(f"{where}: {problem}. Fix: see the format of groups in docs/label.md") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). Fix: name a JSONL file of groups") from error


def read_groups(path: str | Path) -> list[Group]:
    """Read a JSONL file of groups, or that in a folder. Identical groups count once.

    Warns if few of the answers that recipes/sample.py sampled ended with EOS.

    Raises:
        RecipeError: if the file cannot be read, is empty, mixes texts and messages, or holds one id with different contents.
    """
    require_groups(str(path))
    path = Path(path) / GROUPS if Path(path).is_dir() else Path(path)
    groups: dict[str, Group] = {}
    for where, row in read_rows(path, GroupRow):
        group = row.group()
        first = groups.setdefault(group.id, group)
        if first != group:
            raise RecipeError(
                f"{where}: id: '{group.id}' is the id of an earlier, different row. Fix: give each group its own id"
            )
        if group.conversational != next(iter(groups.values())).conversational:
            raise RecipeError(f"{where}: prompt: texts and messages are mixed. Fix: write all prompts in one form")
    if not groups:
        raise RecipeError(f"{path}: the file has no rows. Fix: run recipes/sample.py")
    if path.name == GROUPS and "ended" in (sampled := read_json(path.with_name(SAMPLED))):
        limit = sampled["arguments"]["max_completion_length"]
        warn_of_endless(str(path), sampled["ended"], sampled["answers"], limit)
    return list(groups.values())
