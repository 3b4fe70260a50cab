"""PPO, which TRL dropped in 1.13."""

from rlhf_recipes.config.ppo import PPOConfig
from rlhf_recipes.training.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
