"""Choose the groups to rank: at random, or by the disagreement of an ensemble."""

import itertools
import random
import statistics
from collections.abc import Sequence

from rlhf_recipes.config.rank import RankArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.groups import Group
from rlhf_recipes.generation.policies import load_policy_bank
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.rewards.reward_models import Ensemble
from rlhf_recipes.rewards.saved import load_saved_reward

from trl import ModelConfig


def choose_groups(groups: Sequence[Group], number: int | None, seed: int, ensemble: Ensemble | None = None) -> list[Group]:
    """Return the groups on which an ensemble disagrees most, or random ones.

    Args:
        groups: to choose from.
        number: of groups; None for all.
        seed: of the random choice.
        ensemble: of reward models, or None.
    """
    if number is None or number >= len(groups):
        return list(groups)
    if ensemble is None:
        return random.Random(seed).sample(list(groups), number)
    scores = disagreement(groups, ensemble)
    order = sorted(range(len(groups)), key=lambda index: -scores[index])
    return [groups[index] for index in sorted(order[:number])]


def disagreement(groups: Sequence[Group], ensemble: Ensemble) -> list[float]:
    """Return how much an ensemble disagrees on the order within each group.

    For two completions this is the standard deviation over members of the difference of their scores: what a member adds to
    all completions of a prompt says nothing about their order. For a group it is the mean over pairs of completions.

    Args:
        groups: (N,).
        ensemble: of M reward models.

    Returns:
        (N,); 0 if all members agree.
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
