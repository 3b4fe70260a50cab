"""Supervised fine-tuning."""

from rlhf_recipes.training.mixin import TrainerMixin

import trl


class SFTTrainer(TrainerMixin, trl.SFTTrainer):
    """TRL's `SFTTrainer` with the checkpoints of `TrainerMixin`."""
