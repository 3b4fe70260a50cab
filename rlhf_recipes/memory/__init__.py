"""What a run will take in memory, from the configuration of its model alone, and what to set so that it fits a card."""

from rlhf_recipes.memory.autofit import NoFitError, advice, autofit
from rlhf_recipes.memory.stages import Arguments, Plan, plan_stage
from rlhf_recipes.memory.table import report

__all__ = ["Arguments", "NoFitError", "Plan", "advice", "autofit", "plan_stage", "report"]
