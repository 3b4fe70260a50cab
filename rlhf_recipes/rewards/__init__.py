"""Reward functions to name by dotted path, and reward models as roles."""

from rlhf_recipes.rewards.functions import Abstention, LengthPenalty, RepetitionPenalty, exact_match, normalised_match
from rlhf_recipes.rewards.reward_funcs import load_rewards
from rlhf_recipes.rewards.similarity import Similarity

__all__ = [
    "Abstention",
    "LengthPenalty",
    "RepetitionPenalty",
    "Similarity",
    "exact_match",
    "load_rewards",
    "normalised_match",
]
