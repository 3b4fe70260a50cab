"""Rank sampled groups: by people, by a chat model, or by a simulated labeller."""

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import RANKED, write_json, write_text
from rlhf_recipes.feedback.groups import Group
from rlhf_recipes.feedback.labels import Store, rankings
from rlhf_recipes.generation.judges import ChatJudge, read_chat_judge
from rlhf_recipes.rewards.protocol import Reward, score_completions
from rlhf_recipes.rewards.reward_funcs import load_rewards

from trl.trainer.utils import get_callable_name

RANKINGS = "rankings.jsonl"
Rows = list[dict[str, Any]]


class Labeler(Protocol):
    """Who ranks groups."""

    def rank(self, groups: Sequence[Group]) -> Rows:
        """Return rows of `prompt`, `completions`, `ranks`, `labeller` and `id`.

        The lowest rank is the best. Groups in which nothing is preferred have no row.
        """


def read_labeler(entry: Any, seed: int) -> Labeler:
    """Return the labeler that the YAML key `labeller` describes.

    `{store: FILE}`: people who use recipes/label.py. `{url: ..., model: ...}`: a chat model, as a judge in recipes/evaluate.py.
    `{path: ..., arguments: ..., noise: ...}`: a simulated labeller who prefers what a reward function scores higher.

    Raises:
        RecipeError: for anything else.
    """
    match entry:
        case {"store": str(path), **others} if not others:
            return HumanLabeler(Path(path))
        case {"url": _}:
            return JudgeLabeler(read_chat_judge(entry))
        case {"path": str(), **others} if set(others) <= {"arguments", "noise"}:
            noise = others.pop("noise", 0.0)
            if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
                raise RecipeError(f"labeller: noise: {noise!r}: must be a number, 0 or more")
            (reward,), _ = load_rewards([{"path": entry["path"], **others}])
            return SimulatedLabeler(reward, float(noise), seed)
    raise RecipeError(
        f"labeller: {entry!r}: unknown. Fix: give {{store: FILE}} for people, {{url: ..., model: ...}} for a chat model, or "
        "{path: ..., noise: ...} for a reward function"
    )


@dataclass(frozen=True)
class HumanLabeler:
    """People who rank on the page of recipes/label.py.

    Parameters:
        path: the database of labels; created if it does not exist.
    """

    path: Path

    def rank(self, groups: Sequence[Group]) -> Rows:
        """Return people's rankings of these groups. The page now offers only these.

        Raises:
            RecipeError: while a group is neither ranked nor skipped by everyone who labels these groups.
        """
        with Store(self.path) as store:
            store.add(groups, exclusive=True)
            wanted = {group.id for group in groups if group.comparable()}
            contents = [(group, labels) for group, labels in store.contents() if group.id in wanted]
        labels = [label for _, labels in contents for label in labels]
        labellers, skips = {label.labeller for label in labels}, Counter(label.group for label in labels if label.ranks is None)
        missing = wanted - {label.group for label in labels if label.ranks is not None}
        missing = {group for group in missing if not labellers or skips[group] < len(labellers)}
        if missing:
            skipped = sum(group in skips for group in missing)
            skipped = f" ({skipped} were skipped and wait for another labeller)" if skipped else ""
            raise RecipeError(
                f"labeller: {self.path}: {len(missing)} of {len(wanted)} groups are not ranked yet{skipped}. Fix: run "
                f"`python recipes/label.py --store {self.path}`, rank them, and run this again"
            )
        return rankings(contents)


@dataclass(frozen=True)
class JudgeLabeler:
    """A chat model that compares all pairs in both orders. More wins rank higher."""

    judge: ChatJudge

    def rank(self, groups: Sequence[Group]) -> Rows:
        """Return a ranking of each group."""
        texts = [group.texts() for group in groups]
        pairs = [(n, i, j) for n, answers in enumerate(texts) for i, j in itertools.combinations(range(len(answers)), 2)]
        credits = self.judge.compare(
            [groups[n].prompt for n, _, _ in pairs], [texts[n][i] for n, i, _ in pairs], [texts[n][j] for n, _, j in pairs]
        )["credits"]
        wins = [[0.0] * len(answers) for answers in texts]
        for (n, i, j), credit in zip(pairs, credits, strict=True):
            wins[n][i] += credit
            wins[n][j] += 1 - credit
        name = f"judge: {self.judge.model}"
        return [_ranking(group, scores, name) for group, scores in zip(groups, wins, strict=True)]


@dataclass(frozen=True)
class SimulatedLabeler:
    """A labeller who prefers by a noisy reward, as in the Bradley-Terry model.

    Equal rewards tie. Of two others the higher one is preferred with probability sigmoid(difference / noise): each reward in a
    group gets one draw of Gumbel noise, seeded by the id of the group.

    Parameters:
        reward: a reward function.
        noise: scale of the noise; 0 for none.
        seed: of the noise.
    """

    reward: Reward
    noise: float
    seed: int

    def rank(self, groups: Sequence[Group]) -> Rows:
        """Return a ranking of each group whose rewards are not all equal.

        Raises:
            RecipeError: if the reward does not apply to a completion.
        """
        name = f"simulated: {get_callable_name(self.reward)}, noise {self.noise:g}"
        rows = []
        for group, scores in zip(groups, self._scores(groups), strict=True):
            # Seeded per group: a ranking does not depend on the other groups, and no two groups share their noise
            rng = random.Random(f"labeller/{self.seed}/{group.id}")
            noisy = {score: score - self.noise * math.log(-math.log(rng.random())) for score in sorted(set(scores))}
            if len(noisy) > 1:
                rows.append(_ranking(group, [noisy[score] for score in scores], name))
        return rows

    def _scores(self, groups: Sequence[Group]) -> list[list[float]]:
        keys = dict.fromkeys(key for group in groups for key in group.columns)
        columns = {key: [group.columns.get(key) for group in groups for _ in group.completions] for key in keys}
        prompts = [group.prompt for group in groups for _ in group.completions]
        scores = score_completions(
            self.reward, prompts, [answer for group in groups for answer in group.completions], **columns
        )
        if None in scores:
            prompt = prompts[scores.index(None)]
            raise RecipeError(f"labeller: {get_callable_name(self.reward)}: returned None for an answer to {prompt!r:.80}")
        remaining = iter(scores)
        return [list(itertools.islice(remaining, len(group.completions))) for group in groups]


def _ranking(group: Group, scores: Sequence[float], labeller: str) -> dict[str, Any]:
    """Rank completions by scores, the highest first; equal scores tie."""
    order = sorted(set(scores), reverse=True)
    row = {"prompt": group.prompt, "completions": group.completions, "ranks": [order.index(score) + 1 for score in scores]}
    return row | ({"sources": group.sources} if group.sources else {}) | {"labeller": labeller, "id": group.id}


def write_rankings(folder: str | Path, rows: Rows, chosen: int) -> str:
    """Write `rankings.jsonl` and then `rank.json`, and return a summary for the user.

    Args:
        folder: created if it does not exist.
        rows: from a labeler.
        chosen: number of groups that were to be ranked.
    """
    folder, labellers = Path(folder), sorted({row["labeller"] for row in rows})
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RANKINGS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(folder / RANKED, {"labellers": labellers, "chosen": chosen, "ranked": len(rows)})
    summary = f"Wrote {len(rows)} rankings of {chosen} groups, by {', '.join(labellers) or 'nobody'}, to {folder / RANKINGS}."
    return summary + (" The others were skipped, or nothing in them was preferred." if len(rows) < chosen else "")
