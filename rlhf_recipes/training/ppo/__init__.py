"""PPO, which TRL dropped in 1.13: its arguments, its trainer, and its maths in small functions."""

from rlhf_recipes.config.ppo import PPOConfig
from rlhf_recipes.training.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
