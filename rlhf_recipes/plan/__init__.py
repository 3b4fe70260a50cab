"""What a run will take in memory, from the configuration of its model alone, and what to set so that it fits a card."""

from rlhf_recipes.plan.dial import NoFitError, advice, pick
from rlhf_recipes.plan.report import report
from rlhf_recipes.plan.stages import Arguments, Plan, plan_stage

__all__ = ["Arguments", "NoFitError", "Plan", "advice", "pick", "plan_stage", "report"]
