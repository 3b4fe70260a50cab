"""Rankings of sampled groups: which groups are to be ranked, and by whom: people, a judge, or a simulated labeller."""

import itertools
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.config.rank import RankArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import RANKED, write_json, write_text
from rlhf_recipes.feedback.labels import Store, rankings
from rlhf_recipes.feedback.labels.groups import Group, group_of, read_rows
from rlhf_recipes.feedback.sampling import GROUPS
from rlhf_recipes.generation.judges import ChatJudge, read_chat_judge
from rlhf_recipes.generation.policies import load_policy_bank
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.rewards.protocol import score_completions
from rlhf_recipes.rewards.reward_funcs import load_rewards
from rlhf_recipes.rewards.reward_models import Ensemble
from rlhf_recipes.rewards.saved import load_saved_reward

from trl import ModelConfig
from trl.trainer.utils import get_callable_name

RANKINGS = "rankings.jsonl"


@dataclass(frozen=True)
class Sampled:
    """A group to be ranked, with the columns of the data that came along."""

    group: Group
    columns: dict[str, Any]


Labeller = Callable[[Sequence[Sampled]], list[dict[str, Any]]]
"""Groups -> rows of `prompt`, `completions`, `ranks` (0 or 1 is the best) and `labeller`."""


def read_sampled(path: str | Path) -> list[Sampled]:
    """The groups that recipes/sample.py wrote, from its folder or from its file.

    Raises:
        RecipeError: if the file cannot be read, or a row is no group.
    """
    path = Path(path) / GROUPS if Path(path).is_dir() else Path(path)
    found = []
    for number, row in read_rows(path):
        group = group_of(row, f"{path}: row {number}")
        found.append(Sampled(group, {key: value for key, value in row.items() if key not in group.row()}))
    if not found:
        raise RecipeError(f"{path}: the file has no rows")
    return found


# --- Which --------------------------------------------------------------------------------------------------


def choose(groups: Sequence[Sampled], number: int | None, seed: int, ensemble: Ensemble | None = None) -> list[Sampled]:
    """Those that are worth a label: drawn at random, or those on which the members of an ensemble disagree most.

    Args:
        groups: to choose from.
        number: how many; None: all.
        seed: of the draw.
        ensemble: reward models; None: at random.
    """
    if number is None or number >= len(groups):
        return list(groups)
    if ensemble is None:
        return random.Random(seed).sample(list(groups), number)
    doubts = disagreement(groups, ensemble)
    order = sorted(range(len(groups)), key=lambda place: -doubts[place])
    return [groups[place] for place in sorted(order[:number])]


def disagreement(groups: Sequence[Sampled], ensemble: Ensemble) -> list[float]:
    """Of each group the mean, over pairs of its completions, of the deviation over members of how much better one is.

    What two completions share, such as a prompt on which a member scores everything high, says nothing about their order.

    Args:
        groups: (N,).
        ensemble: of M reward models.

    Returns:
        (N,) standard deviations of differences of scores; 0 where all members agree.
    """
    prompts = [one.group.prompt for one in groups for _ in one.group.completions]
    completions = [completion for one in groups for completion in one.group.completions]
    scores = list(zip(*(member(prompts, completions) for member in ensemble.members), strict=True))  # (completions, M)
    starts = itertools.accumulate((len(one.group.completions) for one in groups), initial=0)
    return [_doubt(scores[first:last]) for first, last in itertools.pairwise(starts)]


def _doubt(scores: Sequence[Sequence[float]]) -> float:
    pairs = itertools.combinations(scores, 2)
    return statistics.fmean(statistics.pstdev(a - b for a, b in zip(one, other, strict=True)) for one, other in pairs)


def load_ensemble(model: ModelConfig, arguments: RankArguments) -> Ensemble:
    """The ensemble in the folder `reward`, on its base.

    Raises:
        RecipeError: as in `load_saved_reward`; for a single reward model.
    """
    tokenizer = load_tokenizer(model, arguments, start_from=arguments.reward)
    bank = load_policy_bank(model, arguments, {}, tokenizer)
    reward = load_saved_reward(arguments.reward, bank.model, tokenizer)
    if not isinstance(reward, Ensemble):
        raise RecipeError(
            f"reward: {arguments.reward} holds one reward model, which cannot disagree: train with `ensemble_size: 3`"
        )
    return reward


# --- By whom ------------------------------------------------------------------------------------------------


def read_labeller(entry: Any, seed: int) -> Labeller:
    """Who ranks, of the YAML key `labeller`.

    `{store: FILE}` is people, by recipes/label.py; `{url: ..., model: ...}` a chat model, as a judge in recipes/evaluate.py;
    `{path: ..., arguments: ..., noise: ...}` a simulated labeller, whose liking a reward function says.

    Raises:
        RecipeError: for anything else.
    """
    if isinstance(entry, dict) and set(entry) == {"store"} and isinstance(entry["store"], str):
        return HumanLabeler(Path(entry["store"]))
    if isinstance(entry, dict) and "url" in entry:
        return Judge(read_chat_judge(entry))
    if isinstance(entry, dict) and isinstance(entry.get("path"), str) and set(entry) <= {"path", "arguments", "noise"}:
        noise = entry.get("noise", 0.0)
        if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
            raise RecipeError(f"labeller: noise: {noise!r} is not a scale: a number, 0 or more")
        (reward,), _ = load_rewards([{key: value for key, value in entry.items() if key != "noise"}])
        return SimulatedLabeler(reward, float(noise), seed)
    raise RecipeError(
        "labeller: must be {store: FILE} for people, {url: ..., model: ...} for a chat model, or {path: ..., noise: ...} for a "
        f"reward function in the role of a labeller: found {entry!r}"
    )


@dataclass(frozen=True)
class HumanLabeler:
    """Those who label by recipes/label.py.

    Parameters:
        path: the database of labels; made where there is none.
    """

    path: Path

    def __call__(self, groups: Sequence[Sampled]) -> list[dict[str, Any]]:
        """What they have said of these groups, which are the only ones that the page gives out from now on.

        Raises:
            RecipeError: while one of them is not ranked yet, and not skipped by everyone who labels them either.
        """
        with Store(self.path) as store:
            store.add((one.group for one in groups), alone=True)
            wanted = {one.group.id for one in groups if one.group.comparable()}
            labels = [label for label in store.labels() if label.group in wanted]
            everyone = {label.labeller for label in labels}
            lacking = wanted - {label.group for label in labels if label.ranks is not None}
            skipped = Counter(label.group for label in labels)
            lacking = {group for group in lacking if not everyone or skipped[group] < len(everyone)}
            if lacking:
                raise RecipeError(
                    f"labeller: {len(lacking)} of {len(wanted)} groups in {self.path} are not ranked yet"
                    f"{_skipped(lacking, skipped)}: run `python recipes/label.py --store {self.path}`, rank them, and then "
                    "this again"
                )
            return [row for row in rankings(store) if row["id"] in wanted]


def _skipped(lacking: set[str], skipped: Counter[str]) -> str:
    number = sum(group in skipped for group in lacking)
    return f" ({number} were skipped, and wait for another labeller)" if number else ""


@dataclass(frozen=True)
class Judge:
    """A chat model, which is asked about every two completions of a group in both orders; who wins more ranks higher."""

    judge: ChatJudge

    def __call__(self, groups: Sequence[Sampled]) -> list[dict[str, Any]]:
        """A ranking of each group."""
        texts = [one.group.texts() for one in groups]
        asked = [(place, *pair) for place, said in enumerate(texts) for pair in itertools.combinations(range(len(said)), 2)]
        credits = self.judge.compare(
            [groups[place].group.prompt for place, _, _ in asked],
            [texts[place][first] for place, first, _ in asked],
            [texts[place][second] for place, _, second in asked],
        )["credits"]
        wins = [[0.0] * len(said) for said in texts]
        for (place, first, second), credit in zip(asked, credits, strict=True):
            wins[place][first] += credit
            wins[place][second] += 1 - credit
        named = f"judge: {self.judge.model}"
        return [_row(one.group, scores, named) for one, scores in zip(groups, wins, strict=True)]


@dataclass(frozen=True)
class SimulatedLabeler:
    """A labeller whose liking of a completion is a reward, with noise.

    Completions of one reward tie; of two others the better one is preferred with probability sigmoid(difference / noise), as
    Bradley and Terry have it: Gumbel noise, drawn once for each reward within a group, from the seed and the id of the group.

    Parameters:
        reward: with TRL's signature.
        noise: its scale; 0: none.
        seed: of the noise.
    """

    reward: Callable[..., Any]
    noise: float
    seed: int

    def __call__(self, groups: Sequence[Sampled]) -> list[dict[str, Any]]:
        """A ranking of each group whose rewards are not all the same."""
        named = f"simulated: {get_callable_name(self.reward)}, noise {self.noise:g}"
        rows = []
        for one, scores in zip(groups, self._scores(groups), strict=True):
            # By the group: neither other groups nor the round change what is said of this one, and no two share their noise
            rng = random.Random(f"labeller/{self.seed}/{one.group.id}")
            liking = {score: score - self.noise * math.log(-math.log(rng.random())) for score in sorted(set(scores))}
            if len(liking) > 1:
                rows.append(_row(one.group, [liking[score] for score in scores], named))
        return rows

    def _scores(self, groups: Sequence[Sampled]) -> list[list[float]]:
        keys = dict.fromkeys(key for one in groups for key in one.columns)
        columns = {key: [one.columns.get(key) for one in groups for _ in one.group.completions] for key in keys}
        prompts = [one.group.prompt for one in groups for _ in one.group.completions]
        scores = score_completions(
            self.reward, prompts, [answer for one in groups for answer in one.group.completions], **columns
        )
        if None in scores:
            place = scores.index(None)
            raise RecipeError(f"labeller: {get_callable_name(self.reward)} says nothing of an answer to {prompts[place]!r:.80}")
        starts = itertools.accumulate((len(one.group.completions) for one in groups), initial=0)
        return [scores[first:last] for first, last in itertools.pairwise(starts)]


def _row(group: Group, scores: Sequence[float], labeller: str) -> dict[str, Any]:
    """A ranking by scores, the highest first; equal ones tie."""
    order = sorted(set(scores), reverse=True)
    sources = {"sources": group.sources} if group.sources else {}
    ranks = [order.index(score) + 1 for score in scores]
    return {
        "prompt": group.prompt,
        "completions": group.completions,
        "ranks": ranks,
        **sources,
        "labeller": labeller,
        "id": group.id,
    }


# --- What comes of it ---------------------------------------------------------------------------------------


def write_rankings(folder: str | Path, rows: Sequence[dict[str, Any]], chosen: int) -> str:
    """Writes `rankings.jsonl` and, last, `rank.json`; returns what to tell the user.

    Args:
        folder: made where it is missing.
        rows: from a labeller.
        chosen: how many groups were to be ranked.

    Raises:
        RecipeError: if the folder cannot be written to.
    """
    folder, labellers = Path(folder), sorted({row["labeller"] for row in rows})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / RANKINGS, text)
        write_json(folder / RANKED, {"labellers": labellers, "chosen": chosen, "ranked": len(rows)})
    except OSError as error:
        raise RecipeError(f"output_dir: {folder}: cannot be written to ({error.strerror}): name another folder") from error
    told = f"{len(rows)} rankings of {chosen} groups are in {folder / RANKINGS}, by {', '.join(labellers) or 'nobody'}"
    if len(rows) < chosen:
        told += ". Groups whose completions a labeller likes alike, or skipped, give none"
    return told
