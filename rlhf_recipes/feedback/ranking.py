"""Rank sampled groups: by people, by a chat model, or by a simulated labeller."""

import itertools
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_recipes.config.rank import RankArguments
from rlhf_recipes.core.errors import LabelsMissingError, RecipeError
from rlhf_recipes.core.files import RANKED, write_json, write_text
from rlhf_recipes.feedback.groups import Group
from rlhf_recipes.feedback.labels import Store, rankings
from rlhf_recipes.generation.judges import ChatJudge, read_chat_judge
from rlhf_recipes.generation.policies import load_policy_bank
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.rewards.protocol import Reward, score_completions
from rlhf_recipes.rewards.reward_funcs import load_rewards
from rlhf_recipes.rewards.reward_models import Ensemble
from rlhf_recipes.rewards.saved import load_saved_reward

from trl import ModelConfig
from trl.trainer.utils import get_callable_name

RANKINGS = "rankings.jsonl"
Rows = list[dict[str, Any]]
Labeler = Callable[[Sequence[Group]], Rows]
"""Ranks groups: rows of `prompt`, `completions`, `ranks` (the lowest is the best), `labeller` and `id`.

Groups in which nothing is preferred have no row.
"""


# --- The choice of groups ---------------------------------------------------------------------------------------------


def choose_groups(groups: Sequence[Group], number: int | None, seed: int, ensemble: Ensemble | None = None) -> list[Group]:
    """Return the groups on which an ensemble disagrees most, or random ones, or all."""
    if number is None or number >= len(groups):
        return list(groups)
    if ensemble is None:
        return random.Random(seed).sample(list(groups), number)
    scores = disagreement(groups, ensemble)
    order = sorted(range(len(groups)), key=lambda index: -scores[index])
    return [groups[index] for index in sorted(order[:number])]


def disagreement(groups: Sequence[Group], ensemble: Ensemble) -> list[float]:
    """Return how much an ensemble disagrees on the order within each group, (N,).

    For two completions this is the standard deviation over members of the difference of their scores: what a member adds to
    all completions of a prompt says nothing about their order. For a group it is the mean over pairs of completions.
    """
    prompts = [group.prompt for group in groups for _ in group.completions]
    completions = [completion for group in groups for completion in group.completions]
    scores = list(zip(*(member(prompts, completions) for member in ensemble.members), strict=True))  # (completions, M)
    starts = itertools.accumulate((len(group.completions) for group in groups), initial=0)
    return [_mean_deviation(scores[first:last]) for first, last in itertools.pairwise(starts)]


def _mean_deviation(scores: Sequence[Sequence[float]]) -> float:
    pairs = itertools.combinations(scores, 2)
    return statistics.fmean(statistics.pstdev(a - b for a, b in zip(one, other, strict=True)) for one, other in pairs)


def load_ensemble(model: ModelConfig, arguments: RankArguments) -> Ensemble:
    """Load the ensemble in the folder `reward`, on its base.

    Raises:
        RecipeError: as in `load_saved_reward`, and for a single reward model.
    """
    tokenizer = load_tokenizer(model, arguments, start_from=arguments.reward)
    bank = load_policy_bank(model, arguments, {}, tokenizer)
    reward = load_saved_reward(arguments.reward, bank.model, tokenizer)
    if not isinstance(reward, Ensemble):
        raise RecipeError(
            f"reward: {arguments.reward} holds one reward model, which cannot disagree. Fix: train with `ensemble_size: 3`"
        )
    return reward


# --- Labelers ---------------------------------------------------------------------------------------------------------


def read_labeler(entry: Any, seed: int) -> Labeler:
    """Return the labeler that the YAML key `labeller` describes.

    `{store: FILE}`: people who use recipes/label.py. `{url: ..., model: ...}`: a chat model, as a judge in recipes/evaluate.py.
    `{path: ..., arguments: ..., noise: ...}`: a simulated labeller who prefers what a reward function scores higher.

    Raises:
        RecipeError: for anything else.
    """
    match entry:
        case {"store": str(path), **others} if not others:
            return partial(rank_by_people, Path(path))
        case {"url": _}:
            return partial(rank_by_judge, read_chat_judge(entry))
        case {"path": str(), **others} if set(others) <= {"arguments", "noise"}:
            noise = others.pop("noise", 0.0)
            if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
                raise RecipeError(f"labeller: noise: {noise!r}: must be a number, 0 or more")
            (reward,), _ = load_rewards([{"path": entry["path"], **others}])
            return partial(rank_by_reward, reward, float(noise), seed)
    raise RecipeError(
        f"labeller: {entry!r}: unknown. Fix: give {{store: FILE}} for people, {{url: ..., model: ...}} for a chat model, or "
        "{path: ..., noise: ...} for a reward function"
    )


def rank_by_people(path: Path, groups: Sequence[Group]) -> Rows:
    """Return the rankings in a store, whose page now offers only `groups`.

    Raises:
        LabelsMissingError: while a group is neither ranked nor skipped by everyone who labels these groups.
    """
    with Store(path) as store:
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
        raise LabelsMissingError(
            f"{path}: {len(missing)} of {len(wanted)} groups are not ranked yet{skipped}. Next: run "
            f"`python recipes/label.py --store {path}`, rank them, and run this again"
        )
    return rankings(contents)


def rank_by_judge(judge: ChatJudge, groups: Sequence[Group]) -> Rows:
    """Let a chat model compare all pairs in both orders. More wins rank higher."""
    texts = [group.texts() for group in groups]
    pairs = [(n, i, j) for n, answers in enumerate(texts) for i, j in itertools.combinations(range(len(answers)), 2)]
    credits = judge.compare(
        [groups[n].prompt for n, _, _ in pairs], [texts[n][i] for n, i, _ in pairs], [texts[n][j] for n, _, j in pairs]
    )["credits"]
    wins = [[0.0] * len(answers) for answers in texts]
    for (n, i, j), credit in zip(pairs, credits, strict=True):
        wins[n][i] += credit
        wins[n][j] += 1 - credit
    return [_ranking(group, scores, f"judge: {judge.model}") for group, scores in zip(groups, wins, strict=True)]


def rank_by_reward(reward: Reward, noise: float, seed: int, groups: Sequence[Group]) -> Rows:
    """Simulate a labeller who prefers by a noisy reward (the Bradley-Terry model).

    Equal rewards tie. Of two others the higher one is preferred with probability sigmoid(difference / noise): each reward in a
    group gets one draw of Gumbel noise of scale `noise`, seeded by `seed` and the id of the group.

    Raises:
        RecipeError: if the reward does not apply to a completion.
    """
    name = get_callable_name(reward)
    keys = dict.fromkeys(key for group in groups for key in group.columns)
    columns = {key: [group.columns.get(key) for group in groups for _ in group.completions] for key in keys}
    prompts = [group.prompt for group in groups for _ in group.completions]
    completions = [answer for group in groups for answer in group.completions]
    all_scores = score_completions(reward, prompts, completions, **columns)
    if None in all_scores:
        prompt = prompts[all_scores.index(None)]
        raise RecipeError(f"labeller: {name}: returned None for an answer to {prompt!r:.80}")
    remaining, rows = iter(all_scores), []
    for group in groups:
        scores = list(itertools.islice(remaining, len(group.completions)))
        # Seeded per group: a ranking does not depend on the other groups, and no two groups share their noise
        rng = random.Random(f"labeller/{seed}/{group.id}")
        noisy = {score: score - noise * math.log(-math.log(rng.random())) for score in sorted(set(scores))}
        if len(noisy) > 1:
            rows.append(_ranking(group, [noisy[score] for score in scores], f"simulated: {name}, noise {noise:g}"))
    return rows


def _ranking(group: Group, scores: Sequence[float], labeller: str) -> dict[str, Any]:
    """Rank completions by scores, the highest first; equal scores tie."""
    order = sorted(set(scores), reverse=True)
    row = {"prompt": group.prompt, "completions": group.completions, "ranks": [order.index(score) + 1 for score in scores]}
    return row | ({"sources": group.sources} if group.sources else {}) | {"labeller": labeller, "id": group.id}


def write_rankings(folder: str | Path, rows: Rows, chosen: int) -> str:
    """Write `rankings.jsonl` and then `rank.json`, and return a summary for the user.

    `chosen` is the number of groups that were to be ranked.

    Raises:
        RecipeError: without rankings.
    """
    if not rows:
        raise RecipeError(f"labeller: prefers no answer in any of {chosen} groups. Fix: another labeller, or other groups")
    folder, labellers = Path(folder), sorted({row["labeller"] for row in rows})
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RANKINGS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(folder / RANKED, {"labellers": labellers, "chosen": chosen, "ranked": len(rows)})
    summary = f"Wrote {len(rows)} rankings of {chosen} groups, by {', '.join(labellers)}, to {folder / RANKINGS}."
    return summary + (" The others were skipped, or nothing in them was preferred." if len(rows) < chosen else "")
