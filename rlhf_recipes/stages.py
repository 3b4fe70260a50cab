"""The registry of stages: what the library knows of each recipe."""

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, did_you_mean
from rlhf_recipes.core.files import METRICS, RANKED, RECIPE, SAMPLED
from rlhf_recipes.core.inspection import dataclass_fields

# The parser and the argument classes import PyTorch, which takes seconds: they are imported where they are needed

_CONFIG, _DATA, _MODEL = "rlhf_recipes.config", "rlhf_recipes.config.data.DataArguments", "trl.ModelConfig"


@dataclass(frozen=True)
class Stage:
    """What the library knows of a recipe.

    Parameters:
        arguments: dotted paths of the dataclasses that its YAML file fills, in the order in which a recipe unpacks them.
        data: kind of its datasets: "sft", "preference", "ranking" or "prompt"; None if it reads none.
        result: name of the file that it writes last; None if it cannot be a stage of a pipeline.
        trains: whether it runs a trainer, which has checkpoints, trackers and perhaps several processes.
        output: what it saves: a "policy" or a "reward model".
        curves: logged numbers that the report plots.
        card_arguments: arguments that its model card shows, beside those of every training.
        paper: its number on arXiv.
        planner: dotted path of the function that predicts its memory; None: `gpu_memory` leaves the stage alone.
    """

    arguments: tuple[str, ...]
    data: str | None = None
    result: str | None = None
    trains: bool = False
    output: str = "policy"
    curves: tuple[str, ...] = ("loss", "eval_loss")
    card_arguments: tuple[str, ...] = ()
    paper: str | None = None
    planner: str | None = None

    def argument_classes(self) -> tuple[type, ...]:
        """Import the dataclasses of its arguments."""
        return tuple(map(pkgutil.resolve_name, self.arguments))

    def argument_types(self) -> dict[str, str]:
        """Return the keys of its YAML file with their types as text."""
        return {name: annotation for path in self.arguments for name, annotation in _fields_of(path).items()}

    def memory_planner(self) -> Callable[..., Any] | None:
        """Import the function that predicts its memory."""
        return pkgutil.resolve_name(self.planner) if self.planner else None


def _fields_of(path: str) -> dict[str, str]:
    """Return the fields of an argument class, imported if its text does not tell."""
    found = dataclass_fields(path)
    return {item.name: str(item.type) for item in fields(pkgutil.resolve_name(path))} if found is None else found


STAGES: dict[str, Stage] = {
    "sft": Stage(
        arguments=(_DATA, "trl.SFTConfig", _MODEL),
        data="sft",
        result=RECIPE,
        trains=True,
        curves=("loss", "eval_loss", "mean_token_accuracy"),
        planner="rlhf_recipes.memory.planners.plan_sft",
    ),
    "reward": Stage(
        arguments=(f"{_CONFIG}.reward.RewardArguments", _DATA, "trl.RewardConfig", _MODEL),
        data="preference",
        result=RECIPE,
        trains=True,
        output="reward model",
        curves=("loss", "eval_loss", "eval_accuracy"),
        card_arguments=("train_on",),
        paper="2203.02155",
        planner="rlhf_recipes.memory.planners.plan_reward",
    ),
    "ppo": Stage(
        arguments=(f"{_CONFIG}.ppo.PPOArguments", _DATA, f"{_CONFIG}.ppo.PPOConfig", _MODEL),
        data="prompt",
        result=RECIPE,
        trains=True,
        curves=("score", "kl", "entropy", "completions/mean_length", "value/explained_variance", "loss"),
        card_arguments=("reward_funcs", "kl_coef", "ptx_coef"),
        paper="2203.02155",
        planner="rlhf_recipes.memory.planners.plan_ppo",
    ),
    "dpo": Stage(
        arguments=(f"{_CONFIG}.policy.PolicyArguments", _DATA, f"{_CONFIG}.dpo.DPOConfig", _MODEL),
        data="preference",
        result=RECIPE,
        trains=True,
        curves=("loss", "rewards/accuracies", "rewards/margins"),
        card_arguments=("loss_type", "beta"),
        paper="2305.18290",
        planner="rlhf_recipes.memory.planners.plan_dpo",
    ),
    "sample": Stage(
        arguments=(f"{_CONFIG}.sample.SampleArguments", _DATA, _MODEL),
        data="prompt",
        result=SAMPLED,
        planner="rlhf_recipes.memory.planners.plan_evaluate",
    ),
    "rank": Stage(arguments=(f"{_CONFIG}.rank.RankArguments", _MODEL), result=RANKED),
    "evaluate": Stage(
        arguments=(f"{_CONFIG}.evaluate.EvaluateArguments", _DATA, _MODEL),
        data="prompt",
        result=METRICS,
        planner="rlhf_recipes.memory.planners.plan_evaluate",
    ),
    "chat": Stage(arguments=(f"{_CONFIG}.chat.ChatArguments", _MODEL)),
    "merge": Stage(arguments=(f"{_CONFIG}.merge.MergeArguments", _MODEL)),
}
"""Recipe -> its stage. Add an entry to add a stage; docs/contributing.md has an example."""


def pipeline_stages() -> list[str]:
    """Return the recipes that may be stages of a pipeline."""
    return [name for name, stage in STAGES.items() if stage.result]


def training_stages() -> list[str]:
    """Return the recipes that train."""
    return [name for name, stage in STAGES.items() if stage.trains]


def find_stage(recipe: str) -> Stage:
    """Return the stage of a recipe.

    Raises:
        RecipeError: if the registry has no such recipe.
    """
    if recipe not in STAGES:
        raise RecipeError(f"{recipe!r} is none of {', '.join(STAGES)}{did_you_mean(recipe, STAGES)}")
    return STAGES[recipe]


def parse_arguments(recipe: str | Path, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Return a recipe's arguments, as `parse_dataclasses`, in the registry's order."""
    from rlhf_recipes.config.parser import parse_dataclasses

    return parse_dataclasses(recipe, *find_stage(Path(recipe).stem).argument_classes(), argv=argv)


def parse_values(recipe: str, values: Mapping[str, Any], here: bool = True) -> tuple[Any, ...]:
    """Return a recipe's arguments from its YAML file's content, as `parse_mapping`."""
    from rlhf_recipes.config.parser import parse_mapping

    return parse_mapping(recipe, *find_stage(recipe).argument_classes(), values=values, here=here)
