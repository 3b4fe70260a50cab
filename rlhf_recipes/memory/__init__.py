"""Memory plans from a model's `config.json`, and arguments that fit a given card."""

from rlhf_recipes.memory.autofit import NoFitError, advice, autofit
from rlhf_recipes.memory.gpu_arguments import StageArguments
from rlhf_recipes.memory.plan import Plan, format_plans
from rlhf_recipes.memory.planners import plan_stage

__all__ = ["NoFitError", "Plan", "StageArguments", "advice", "autofit", "format_plans", "plan_stage"]
