"""Sample several different completions of each prompt, from one or more policies."""

import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.config.sample import SampleArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import SAMPLED, read_json, write_json
from rlhf_recipes.core.paths import files_in
from rlhf_recipes.feedback.groups import GROUPS
from rlhf_recipes.generation.answers import sample
from rlhf_recipes.generation.eos import warn_of_endless
from rlhf_recipes.generation.policies import Policy, PolicyBank

from datasets import Dataset

logger = logging.getLogger(__name__)


def reject_best_of(policies: dict[str, Policy]) -> None:
    """Raise a `RecipeError` for a best-of-n policy, which cannot be sampled from."""
    for name, policy in policies.items():
        if policy.best_of:
            raise RecipeError(f"policies: {name}: cannot sample from best-of-n. Fix: name '{policy.best_of}' instead")


def sample_groups(
    bank: PolicyBank, policies: Sequence[str], rows: Dataset, arguments: SampleArguments, done: int = 0
) -> Iterator[tuple[list[dict[str, Any]], list[bool]]]:
    """Sample groups part by part: `prompt`, `completions`, `sources`, other columns.

    A completion that a prompt already has is sampled again, in at most `max_attempts` attempts. Policies take turns in writing
    one more if `num_completions` is not a multiple of their number. Each part has its own seed, so that an interrupted run
    resumes to the same result, after `done` prompts (a multiple of `part_size`).

    Yields:
        The groups of the next part, one per prompt: one that always gets the same answer has fewer than 2 completions. And
        of each answer that was sampled, whether it ends with EOS.

    Raises:
        RecipeError: for a prompt that ends with an answer, before anything is sampled: no group may.
    """
    for prompt in rows["prompt"]:
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            raise RecipeError(f"prompt: one ends with the assistant's turn: {prompt!r:.200}. Fix: leave out that turn")
    size = part_size(arguments)
    for first in range(done, len(rows), size):
        part = rows.select(range(first, min(first + size, len(rows))))
        completions, ended = _sample_part(bank, policies, part["prompt"], arguments, first)
        if first == done:
            warn_of_endless(f"policies: {', '.join(policies)}", sum(ended), len(ended), arguments.max_completion_length)
        yield [_group(row, texts) for row, texts in zip(part, completions, strict=True)], ended


def part_size(arguments: SampleArguments) -> int:
    """Return the number of prompts in a part."""
    return max(1, arguments.batch_size // arguments.num_completions)


def _sample_part(
    bank: PolicyBank, policies: Sequence[str], prompts: Sequence[Any], arguments: SampleArguments, first: int
) -> tuple[list[dict[str, tuple[str, str]]], list[bool]]:
    """Return each prompt's different completions, and whether each answer ended.

    A prompt's completions are stripped text -> (text, policy). Answers are all that were sampled.
    """
    completions: list[dict[str, tuple[str, str]]] = [{} for _ in prompts]
    ended: list[bool] = []
    for attempt in range(arguments.max_attempts):
        for turn, policy in enumerate(policies):
            indices = []
            for index, texts in enumerate(completions):
                missing = arguments.num_completions - len(texts)
                indices += [index] * _share(missing, turn, len(policies), first + index + attempt)
            if not indices:
                continue
            with bank.use_policy(policy) as model:
                answers = sample(
                    model,
                    bank.tokenizer,
                    [prompts[index] for index in indices],
                    temperature=arguments.temperature,
                    max_new_tokens=arguments.max_completion_length,
                    batch_size=arguments.batch_size,
                    seed=random.Random(f"{arguments.seed}/{first}/{attempt}/{turn}").getrandbits(31),
                )
            ended += [answer.ended for answer in answers]
            for index, answer in zip(indices, answers, strict=True):
                if answer.text.strip():
                    completions[index].setdefault(answer.text.strip(), (answer.text, policy))
    return completions, ended


def _share(missing: int, turn: int, policies: int, shift: int) -> int:
    """Return how many of the missing completions the policy of this turn writes."""
    remaining = policies - turn  # policies that share what is still missing
    return missing // remaining + ((shift + turn) % remaining < missing % remaining)


def _group(row: dict[str, Any], texts: dict[str, tuple[str, str]]) -> dict[str, Any]:
    plain = isinstance(row["prompt"], str)
    completions = [text if plain else [{"role": "assistant", "content": text}] for text, _ in texts.values()]
    return {**row, "completions": completions, "sources": [policy for _, policy in texts.values()]}


def delete_samples(folder: Path) -> None:
    """Delete the samples in a folder."""
    for name in (GROUPS, SAMPLED):
        (folder / name).unlink(missing_ok=True)


class GroupFile:
    """`groups.jsonl` in a folder. An interrupted run resumes after the last part.

    `arguments` are those of the run, with the names of files and folders that it reads.

    Raises:
        RecipeError: if the folder holds samples of other arguments or files, or is damaged.
    """

    def __init__(self, folder: str | Path, arguments: dict[str, Any]):
        self.folder, self.path = Path(folder), Path(folder) / GROUPS
        files = {path: [size, time] for path, size, time in files_in(arguments, exclude=[self.folder])}
        arguments = json.loads(json.dumps(arguments, default=str))
        self._state = read_json(self.folder / SAMPLED)
        if self._state:
            self._check_state(arguments | files)
        elif self.path.exists():
            raise RecipeError(f"output_dir: {self.path}: was not written by this recipe. Fix: name another folder")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._state = {"arguments": arguments, "files": files, "prompts": 0, "groups": 0, "bytes": 0}
            write_json(self.folder / SAMPLED, self._state)
        with self.path.open("ab") as file:
            file.truncate(self._state["bytes"])  # drop an incomplete part

    def _check_state(self, inputs: dict[str, Any]) -> None:
        """Reject samples of other arguments or changed files, and lost samples."""
        fix = "Fix: name another folder, or delete this one"
        try:
            before, size = self._state["arguments"] | self._state["files"], self._state["bytes"]
            changed = [key for key in before | inputs if before.get(key) != inputs.get(key)]
            lost = size - (self.path.stat().st_size if self.path.exists() else 0)
        except (KeyError, TypeError) as error:
            raise RecipeError(f"output_dir: {self.folder / SAMPLED}: is damaged. {fix}") from error
        if changed:
            key = changed[0]
            difference = f"{key}: {before.get(key)!r} then, {inputs.get(key)!r} now"
            raise RecipeError(f"output_dir: {self.folder}: holds samples of another run ({difference}). {fix}")
        if lost > 0:
            raise RecipeError(f"output_dir: {self.path}: {lost} of {size} bytes are missing. {fix}")

    @property
    def prompts(self) -> int:
        """Number of prompts that are done."""
        return self._state["prompts"]

    @property
    def groups(self) -> int:
        """Number of groups in the file: prompts with at least two completions."""
        return self._state["groups"]

    def append(self, part: Sequence[dict[str, Any]], ended: Sequence[bool] = ()) -> None:
        """Append groups with at least two completions, durably when this returns.

        `ended` tells of every answer that was sampled for them whether it ends with EOS.
        """
        groups = [group for group in part if len(group["completions"]) > 1]
        lines = "".join(json.dumps(group, ensure_ascii=False) + "\n" for group in groups).encode()
        with self.path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        more = {"prompts": len(part), "groups": len(groups), "bytes": len(lines), "answers": len(ended), "ended": sum(ended)}
        for key, number in more.items():
            self._state[key] = self._state.get(key, 0) + number
        write_json(self.folder / SAMPLED, self._state)

    def summary(self) -> str:
        """Return a line for the user, and warn if hardly any prompt makes a group.

        Raises:
            RecipeError: if none does.
        """
        fix = "Fix: raise `temperature` or `max_attempts`, or ask other prompts"
        if not self.groups:
            raise RecipeError(f"temperature: the completions of each of {self.prompts} prompts are alike. {fix}")
        if 10 * self.groups < self.prompts:
            logger.warning("temperature: only %d of %d prompts have different completions. %s", self.groups, self.prompts, fix)
        alike = self.prompts - self.groups
        return f"{self.groups} groups are in {self.path}; {alike} prompts with equal completions were left out"
