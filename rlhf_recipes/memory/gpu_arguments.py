"""The arguments of a stage as on a machine with a GPU, whatever machine this is."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_recipes.stages import parse_values

_MIXED_PRECISION = ("bf16", "fp16", "tf32")


@dataclass(frozen=True)
class StageArguments:
    """The arguments of a stage, and those of the stages before it.

    Parameters:
        values: the fields of all of the recipe's dataclasses.
        producers: folder -> the arguments of the stage that writes it.
        on_gpu: False plans for a CPU, to compare the plan with measurements.
    """

    stage: str
    recipe: str
    values: Mapping[str, Any]
    producers: Mapping[str, "StageArguments"] = field(default_factory=dict)
    on_gpu: bool = True

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, or the default where the recipe has no such key."""
        return self.values.get(name, default)

    def override(self, values: Mapping[str, Any]) -> "StageArguments":
        """Return the arguments with other values over them."""
        return replace(self, values={**self.values, **values})


def resolve_for_gpu(
    stage: str, recipe: str, values: Mapping[str, Any], producers: Mapping[str, StageArguments], on_gpu: bool = True
) -> StageArguments:
    """Parse a stage's YAML values as its recipe would on a machine with a GPU."""
    # Without a GPU the parser rejects mixed precision, and defaults to none
    mixed = {key: values[key] for key in _MIXED_PRECISION if key in values and not values.get("use_cpu")}
    groups = parse_values(recipe, {key: value for key, value in values.items() if key not in mixed}, here=False)
    parsed = {key: value for group in groups for key, value in vars(group).items()}
    if on_gpu and not values.get("use_cpu"):
        parsed |= {"bf16": not mixed.get("fp16"), **mixed}
    return StageArguments(stage, recipe, parsed, producers, on_gpu)
