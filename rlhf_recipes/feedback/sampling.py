"""Completions to be ranked: several of each prompt, from one policy or from several, none of them twice."""

import contextlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.config.sample import SampleArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import SAMPLED, read_json, write_json
from rlhf_recipes.core.provenance import files_in
from rlhf_recipes.generation.answers import sample
from rlhf_recipes.generation.policies import Policy, PolicyBank

from datasets import Dataset

GROUPS = "groups.jsonl"


def refuse_best_of(policies: dict[str, Policy]) -> None:
    """Only what samples by itself is sampled from.

    Raises:
        RecipeError: for a best-of-n.
    """
    for name, policy in policies.items():
        if policy.best_of:
            raise RecipeError(f"policies: {name}: a best-of-n is no policy to sample from: name '{policy.best_of}' instead")


def sample_groups(
    bank: PolicyBank, policies: Sequence[str], rows: Dataset, arguments: SampleArguments, done: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """Groups of `prompt`, `completions` and `sources` (which policy wrote each), with the data's other columns, part by part.

    A completion that a prompt has already is drawn again, `max_attempts` times in all. Policies take turns in who writes one
    more, where `num_completions` cannot be divided among them. Every part has a seed of its own, so that what is sampled
    does not depend on where a run was broken off.

    Args:
        bank: the base with the policies.
        policies: their names.
        rows: `prompt`, and columns that go along.
        arguments: what to draw.
        done: prompts to pass over, a number of whole parts.

    Yields:
        The groups of the next part, one for each of its prompts; of a prompt that always has the same answer, one of fewer
        completions than 2.
    """
    size = part_size(arguments)
    for first in range(done, len(rows), size):
        part = rows.select(range(first, min(first + size, len(rows))))
        kept = _draw(bank, policies, part["prompt"], arguments, first)
        yield [_group(row, found) for row, found in zip(part, kept, strict=True)]


def part_size(arguments: SampleArguments) -> int:
    """The prompts that are sampled at once."""
    return max(1, arguments.batch_size // arguments.num_completions)


def _draw(
    bank: PolicyBank, policies: Sequence[str], prompts: Sequence[Any], arguments: SampleArguments, first: int
) -> list[dict[str, tuple[str, str]]]:
    """Of each prompt the different completions: what one says -> its text as it came, and its policy."""
    kept: list[dict[str, tuple[str, str]]] = [{} for _ in prompts]
    for attempt in range(arguments.max_attempts):
        for turn, policy in enumerate(policies):
            asked = [
                place
                for place, found in enumerate(kept)
                for _ in range(_share(arguments.num_completions - len(found), turn, len(policies), first + place + attempt))
            ]
            if not asked:
                continue
            with bank.use_policy(policy) as model:
                answers = sample(
                    model,
                    bank.tokenizer,
                    [prompts[place] for place in asked],
                    temperature=arguments.temperature,
                    max_new_tokens=arguments.max_completion_length,
                    batch_size=arguments.batch_size,
                    seed=random.Random(f"{arguments.seed}/{first}/{attempt}/{turn}").getrandbits(31),
                )
            for place, one in zip(asked, answers, strict=True):
                if one.text.strip():
                    kept[place].setdefault(one.text.strip(), (one.text, policy))
    return kept


def _share(lacking: int, turn: int, policies: int, shift: int) -> int:
    """How many of the completions that are lacking the policy whose turn it is writes."""
    left = policies - turn  # those that come after share what is left now
    return lacking // left + ((shift + turn) % left < lacking % left)


def _group(row: dict[str, Any], found: dict[str, tuple[str, str]]) -> dict[str, Any]:
    texts = [text for text, _ in found.values()]
    plain = isinstance(row["prompt"], str)
    completions = texts if plain else [[{"role": "assistant", "content": text}] for text in texts]
    return {**row, "completions": completions, "sources": [source for _, source in found.values()]}


def discard(folder: Path) -> None:
    """Deletes what was sampled into a folder."""
    for name in (GROUPS, SAMPLED):
        (folder / name).unlink(missing_ok=True)


def _is_state(state: dict[str, Any]) -> bool:
    counts = (state.get(key) for key in ("prompts", "groups", "bytes"))
    mappings = (state.get(key) for key in ("arguments", "files"))
    return all(type(count) is int and count >= 0 for count in counts) and all(isinstance(one, dict) for one in mappings)


class GroupFile:
    """`groups.jsonl` in a folder, to which whole parts are added, so that a run that was broken off can go on.

    Parameters:
        folder: made where it is missing.
        arguments: of the run, with the names of the files and folders that it reads. Another run's file is not added to.

    Raises:
        RecipeError: if the folder cannot be written to, holds what another run wrote, or lacks what this one wrote.
    """

    def __init__(self, folder: str | Path, arguments: dict[str, Any]):
        self.folder, self.path = Path(folder), Path(folder) / GROUPS
        files = {path: [size, time] for path, size, time in files_in(arguments, leave_out=[self.folder])}
        arguments = json.loads(json.dumps(arguments, default=str))
        self._state = read_json(self.folder / SAMPLED)
        if self._state and not _is_state(self._state):
            raise RecipeError(f"output_dir: {self.folder / SAMPLED}: was not written by this recipe: name another folder")
        if self._state:
            self._check(arguments, files)
        elif self.path.exists():
            raise RecipeError(f"output_dir: {self.path} was not written by this recipe: name another folder")
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._state:
                self._state = {"arguments": arguments, "files": files, "prompts": 0, "groups": 0, "bytes": 0}
                self._save()
            with self.path.open("ab") as file:
                file.truncate(self._state["bytes"])  # what was begun and not finished

    def _check(self, arguments: dict[str, Any], files: dict[str, list[int]]) -> None:
        """Refuses to go on with what other arguments or other files gave, or with a file that has lost something."""
        known, remedy = self._state["arguments"], "name another folder, or delete it"
        for key in known:
            if known[key] != arguments.get(key):
                raise RecipeError(
                    f"output_dir: {self.folder} holds samples of a run with another `{key}` "
                    f"({known[key]!r} then, {arguments.get(key)!r} now): {remedy}"
                )
        changed = [path for path in (self._state["files"] | files) if self._state["files"].get(path) != files.get(path)]
        if changed:
            raise RecipeError(f"output_dir: {self.folder} holds samples from before {changed[0]} changed: {remedy}")
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._state["bytes"]:
            raise RecipeError(f"output_dir: {self.path} has {size} of {self._state['bytes']} bytes that were written: {remedy}")

    @property
    def prompts(self) -> int:
        """How many prompts have been asked."""
        return self._state["prompts"]

    @property
    def groups(self) -> int:
        """How many of them have two completions or more, and are in the file."""
        return self._state["groups"]

    def append(self, part: Sequence[dict[str, Any]]) -> None:
        """Adds the groups of a part that can be compared; when it returns they are on the disk.

        Raises:
            RecipeError: if there is no room; what was there stays.
        """
        comparable = [group for group in part if len(group["completions"]) > 1]
        lines = "".join(json.dumps(group, ensure_ascii=False) + "\n" for group in comparable).encode()
        with self._writing(), self.path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
            for key, more in (("prompts", len(part)), ("groups", len(comparable)), ("bytes", len(lines))):
                self._state[key] += more
            self._save()

    def _save(self) -> None:
        write_json(self.folder / SAMPLED, self._state)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RecipeError(
                f"output_dir: {self.folder}: cannot be written to ({error.strerror}); what was sampled before is kept: make "
                "room, and run again"
            ) from error
