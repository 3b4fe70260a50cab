"""The rewards that score answers in an evaluation or a chat, by name."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import holds_result
from rlhf_recipes.generation.policies import PolicyBank
from rlhf_recipes.rewards.reward_funcs import SavedReward, load_rewards
from rlhf_recipes.rewards.saved import load_saved_reward

from datasets import Dataset
from trl.trainer.utils import get_callable_name

_TYPES = {
    "name": (str, "a text"),
    "trained": (bool | list, "true, false or a list of policies"),
    "optional": (bool, "true or false"),
}


@dataclass(frozen=True)
class NamedReward:
    """A reward that scores answers."""

    name: str
    function: Callable[..., Any]  # with TRL's signature
    trained: bool | list[str] = False  # the policies that were trained against it; True for all, False for none
    folder: str | None = None  # of a reward model
    path: str | None = None  # as the user wrote it

    @property
    def about(self) -> str | None:
        """First line of a function's docstring; None for a model."""
        documentation = None if self.folder else inspect.getdoc(self.function)
        return documentation.splitlines()[0] if documentation else None


def load_named_rewards(
    specs: Sequence[str | dict[str, Any]], bank: PolicyBank, batch_size: int = 32, rows: Dataset | None = None
) -> dict[str, NamedReward]:
    """Load the rewards of the YAML key `rewards`.

    Reward models become roles on the bank's base, and read `batch_size` answers at once. `rows` are the prompts, if known.

    Raises:
        RecipeError: As `load_rewards` and `load_saved_reward`. Also if two rewards have one name.
    """
    rewards: dict[str, NamedReward] = {}
    for number, spec in enumerate(specs, start=1):
        key = f"rewards, entry {number}"
        spec = {"path": spec} if isinstance(spec, str) else dict(spec)
        options = {name: spec.pop(name) for name in _TYPES if name in spec}
        for name, value in options.items():
            kind, expected = _TYPES[name]
            if not isinstance(value, kind):
                raise RecipeError(f"{key}: {name}: expected {expected}, found {value!r}")
        if options.get("optional") and not holds_result(str(spec.get("path"))):
            print(f"{key}: skipped, because {spec.get('path')} holds no trained model.")
            continue
        try:
            (reward,), _ = load_rewards([spec], rows)
        except RecipeError as error:  # it names the key of PPO
            raise RecipeError(str(error).replace("reward_funcs, entry 1", key)) from error
        folder, function = None, reward
        if isinstance(reward, SavedReward):
            folder, how = reward.folder, (reward.combine, reward.uncertainty_coef, batch_size)
            function = load_saved_reward(folder, bank.model, bank.tokenizer, *how)
        name = options.get("name") or get_callable_name(function)
        if name in rewards:
            raise RecipeError(f"{key}: two rewards are called '{name}'. Fix: set another `name`.")
        rewards[name] = NamedReward(name, function, options.get("trained", False), folder, str(spec["path"]))
    return rewards
