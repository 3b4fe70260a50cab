"""Rewards: functions to name by dotted path, and reward models as roles on the policy's base."""

from rlhf_recipes.rewards.functions import (
    Abstention,
    LengthPenalty,
    RepetitionPenalty,
    Similarity,
    exact_match,
    load_rewards,
    normalised_match,
)

__all__ = [
    "Abstention",
    "LengthPenalty",
    "RepetitionPenalty",
    "Similarity",
    "exact_match",
    "load_rewards",
    "normalised_match",
]
