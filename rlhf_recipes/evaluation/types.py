"""The typed results of an evaluation, as `metrics.json` holds them.

Fields stand in the order of the JSON keys. None means that there was nothing to measure on, for instance a reward that
applies to no prompt. `UNSET` means that the number does not belong here, for instance a win rate of the baseline; its key
is left out. Intervals are of 95%, with prompts resampled.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import read_json

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


class Unset(Enum):
    """Type of `UNSET`, which is false."""

    UNSET = "unset"

    def __bool__(self) -> bool:
        return False


UNSET = Unset.UNSET


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """The share of comparisons won against the baseline; a tie counts one half."""

    judge: str | Unset = UNSET
    win_rate: float
    interval: list[float]
    n: int  # comparisons
    prompts: int
    ties: int
    equal_length: "Estimate | Unset" = UNSET  # what it would be if all answers were equally long; for free text
    swayed: float | Unset = UNSET  # of a chat model: the share of pairs whose winner changed with their order
    unreadable: int | Unset = UNSET  # of a chat model: replies without a verdict

    @property
    def difference(self) -> "Estimate":
        """The difference from one half."""
        return Estimate(mean=self.win_rate - 0.5, interval=[end - 0.5 for end in self.interval], n=self.prompts)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts."""

    mean: float
    interval: list[float] | None  # None where all prompts agree, so that resampling gives none
    n: int | Unset = UNSET  # prompts that count
    bound: bool | Unset = UNSET  # whether it is an upper bound and no estimate, as the KL of best-of-n is
    difference: "Estimate | Unset | None" = UNSET  # from the baseline, prompt by prompt; None where they share none
    win_rate: WinRate | Unset | None = UNSET  # against the baseline, by this reward


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """The predictions whose confidence lies in (low, high]."""

    low: float
    high: float
    confidence: float
    n: int
    accuracy: float
    interval: list[float]


@dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """What `metrics.calibration.calibration` measures."""

    ece: float
    ece_if_calibrated: float
    brier: float
    log_loss: float
    accuracy: float
    confidence: float
    n: int
    bins: list[CalibrationBin]
    difference: dict[str, Estimate] | Unset = UNSET  # of `ece` and `brier` from the baseline's


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """The best of n answers of a policy, by a reward."""

    policy: str
    n: int
    reward: str


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an adapter was trained, as its `recipe.json` tells."""

    recipe: str
    base: str | None  # name or folder of the base model
    start_from: str | None  # folder of the adapter that it began as
    sources: list[str]  # of its data
    rows: int | None
    steps: int | None
    seconds: float | None
    rewards: list[str]  # what PPO was paid by: folders and dotted paths
    max_completion_length: int | None  # of the answers that PPO sampled, in tokens


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """All that was measured of one policy."""

    adapter: str | None  # its folder; None for the base model and best-of-n
    best_of: BestOf | Unset = UNSET
    training: Training | Unset = UNSET  # where there is a record
    same_as: str | Unset = UNSET  # another policy of exactly these weights
    rewards: dict[str, Estimate | None]  # reward -> mean score
    win_rate: WinRate | Unset | None = UNSET  # against the baseline, by the judge
    leader_wins: WinRate | Unset | None = UNSET  # of the best policy against this one, where the judge is a reward
    kl: Estimate | None  # from the KL reference, in nats per answer
    entropy: Estimate | None  # in nats per answer
    length: Estimate  # in tokens
    ended: Estimate  # share of answers that end with EOS
    diversity: dict[str, float | None]  # see `metrics.texts.diversity`
    truthfulness: dict[str, dict[str, Estimate]] | Unset = UNSET  # group of prompts -> kind of answer -> its share
    over_abstained: Estimate | Unset = UNSET  # share of abstentions where the answer could be known
    reworded: Estimate | Unset = UNSET  # share of answers that count as made up and contain the reference
    calibration: dict[str, CalibrationResult | None] | Unset = UNSET  # by group, of the answers that do not abstain
    perplexity: float | Unset = UNSET  # on pretraining text
    lm_eval: dict[str, Any] | Unset = UNSET  # results of lm-eval, by task

    @property
    def calibration_of_all(self) -> CalibrationResult | None:
        """Calibration on all prompts; None where it was not measured."""
        return self.calibration["all"] if self.calibration else None


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """A reward that scored the answers."""

    trained: bool | list[str]  # the policies that were trained against it; True for all, False for none
    folder: str | None  # of a reward model
    about: str | None  # first line of a function's docstring
    evaluation: dict[str, Any] | None  # `evaluation.json` of a reward model
    training: Training | Unset = UNSET  # of a reward model with a record


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """Rewards and KL of a checkpoint (`step`) or of best-of-n (`n`)."""

    step: int | Unset = UNSET
    n: int | Unset = UNSET
    kl: Estimate | None
    rewards: dict[str, Estimate | None]


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Reward against KL."""

    runs: dict[str, list[FrontierPoint]]  # folder -> its checkpoints in order
    best_of: list[FrontierPoint]  # of the KL reference
    chooser: str | None  # the reward that best-of-n chooses by


@dataclass(frozen=True, kw_only=True)
class ExampleAnswer:
    """An answer in the report, with its kind where there is a short reference."""

    text: str
    kind: str | None  # or `contains_reference`, which counts as made up


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with the first answer of every policy."""

    prompt: str
    reference: str | None
    group: str | None
    answers: dict[str, ExampleAnswer]


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """All that `metrics.json` holds."""

    verdict: list[str]  # the result in a few plain sentences
    details: list[str] = field(default_factory=list)  # every difference in words, with intervals
    warnings: list[str] = field(default_factory=list)  # of the run
    compare_with: str  # the baseline of win rates and differences
    kl_reference: str  # the policy that KL is measured from
    prompts: int
    num_answers: int  # of each policy to each prompt
    temperature: float
    seed: int
    rewards: dict[str, RewardInfo]
    policies: dict[str, PolicyResult]
    has_perplexity: bool  # whether there was pretraining text
    frontier: Frontier | None
    examples: list[Example]
    versions: dict[str, Any]  # of the libraries
    group_names: dict[str, str] = field(default_factory=dict)  # group -> words that follow "answers"

    @property
    def groups(self) -> list[str]:
        """Groups of prompts that truthfulness is reported for."""
        measured = next((list(policy.truthfulness) for policy in self.policies.values() if policy.truthfulness), [])
        return measured[1:] or measured

    @property
    def could_know(self) -> str | None:
        """The group whose answers could be known, where another could not."""
        return next((group for group in self.groups if f"not {group}" in self.groups), None)

    def words_for(self, group: str) -> str:
        """Return words for a group of prompts that follow "answers"; "" for all."""
        return "" if group == "all" else self.group_names.get(group, f"in the group '{group}'")

    @property
    def others(self) -> dict[str, PolicyResult]:
        """The policies that are compared with the baseline."""
        return {name: policy for name, policy in self.policies.items() if name != self.compare_with}


def to_json(result: Any) -> dict[str, Any]:
    """Return the mapping that `metrics.json` holds of one of the dataclasses above."""
    return dataclasses.asdict(result, dict_factory=lambda items: {key: value for key, value in items if value is not UNSET})


def from_json(kind: type[T], content: Any) -> T:
    """Return a dataclass from what `to_json` made of it."""
    return TypeAdapter(kind).validate_python(content)


def read_results(path: Path) -> EvaluationResults:
    """Read `metrics.json`.

    Raises:
        RecipeError: If it does not hold the results of an evaluation.
    """
    try:
        return from_json(EvaluationResults, read_json(path))
    except ValidationError as error:
        raise RecipeError(f"{path}: not the results of an evaluation. Fix: delete it and evaluate again.") from error
