"""The typed results of an evaluation, as `metrics.json` holds them.

Fields stand in the order of the JSON keys. None means that there was nothing to measure on, for instance a reward that
applies to no prompt. `UNSET` means that the number does not belong here, for instance a win rate of the baseline; its key
is left out.
"""

import dataclasses
from dataclasses import dataclass
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
    """The share of comparisons won against the baseline; a tie counts one half.

    Parameters:
        judge: What decided.
        interval: 95%, of prompts resampled.
        n: Comparisons.
        swayed: Of a chat model: the share of pairs whose winner changed with their order.
        unreadable: Of a chat model: replies without a verdict.
    """

    judge: str | Unset = UNSET
    win_rate: float
    interval: list[float]
    n: int
    prompts: int
    ties: int
    swayed: float | Unset = UNSET
    unreadable: int | Unset = UNSET


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts.

    Parameters:
        interval: 95%, of prompts resampled. None where resampling gives none, since all prompts agree.
        n: Prompts that count.
        bound: Whether the number is an upper bound and no estimate, as the KL of best-of-n is.
        difference: From the baseline, prompt by prompt. None where the two share no prompt that counts.
        win_rate: Against the baseline, by this reward.
    """

    mean: float
    interval: list[float] | None
    n: int | Unset = UNSET
    bound: bool | Unset = UNSET
    difference: "Estimate | Unset | None" = UNSET
    win_rate: WinRate | Unset | None = UNSET


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
    """What `metrics.calibration.calibration` measures.

    Parameters:
        difference: Of `ece` and `brier` from the baseline's, by name.
    """

    ece: float
    ece_if_calibrated: float
    brier: float
    log_loss: float
    accuracy: float
    confidence: float
    n: int
    bins: list[CalibrationBin]
    difference: dict[str, Estimate] | Unset = UNSET


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """The best of n answers of a policy, by a reward."""

    policy: str
    n: int
    reward: str


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """All that was measured of one policy.

    Parameters:
        adapter: Its folder. None for the base model and best-of-n.
        rewards: Reward -> mean score.
        win_rate: Against the baseline, by the judge.
        kl: From the KL reference, in nats per answer.
        entropy: In nats per answer.
        length: In tokens.
        ended: Share of answers that end with EOS.
        diversity: See `metrics.diversity.diversity`.
        truthfulness: Group of prompts -> kind of answer -> its share.
        over_abstained: Share of abstentions where the answer could be known.
        calibration: Group of prompts -> calibration of the answers that do not abstain.
        perplexity: On pretraining text.
        lm_eval: Results of lm-eval, by task.
    """

    adapter: str | None
    best_of: BestOf | Unset = UNSET
    rewards: dict[str, Estimate | None]
    win_rate: WinRate | Unset | None = UNSET
    kl: Estimate | None
    entropy: Estimate | None
    length: Estimate
    ended: Estimate
    diversity: dict[str, float | None]
    truthfulness: dict[str, dict[str, Estimate]] | Unset = UNSET
    over_abstained: Estimate | Unset = UNSET
    calibration: dict[str, CalibrationResult | None] | Unset = UNSET
    perplexity: float | Unset = UNSET
    lm_eval: dict[str, Any] | Unset = UNSET

    @property
    def calibration_of_all(self) -> CalibrationResult | None:
        """Calibration on all prompts; None where it was not measured."""
        return self.calibration["all"] if self.calibration else None


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """A reward that scored the answers.

    Parameters:
        trained: The policies that were trained against it; True for all, False for none.
        folder: Of a reward model.
        about: First line of a function's docstring.
        evaluation: `evaluation.json` of a reward model.
    """

    trained: bool | list[str]
    folder: str | None
    about: str | None
    evaluation: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """Rewards and KL of a checkpoint (`step`) or of best-of-n (`n`)."""

    step: int | Unset = UNSET
    n: int | Unset = UNSET
    kl: Estimate | None
    rewards: dict[str, Estimate | None]


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Reward against KL.

    Parameters:
        runs: Folder -> its checkpoints in order.
        best_of: Best-of-n of the KL reference.
        chooser: Reward that best-of-n chooses by.
    """

    runs: dict[str, list[FrontierPoint]]
    best_of: list[FrontierPoint]
    chooser: str | None


@dataclass(frozen=True, kw_only=True)
class ExampleAnswer:
    """An answer in the report, with its kind where there is a short reference."""

    text: str
    kind: str | None


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with the first answer of every policy."""

    prompt: str
    reference: str | None
    group: str | None
    answers: dict[str, ExampleAnswer]


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """All that `metrics.json` holds.

    Parameters:
        verdict: The result in sentences.
        compare_with: The baseline of win rates and differences.
        kl_reference: The policy that KL is measured from.
        prompts: How many.
        num_answers: Of each policy to each prompt.
        has_perplexity: Whether there was pretraining text.
        versions: Of the libraries.
    """

    verdict: list[str]
    compare_with: str
    kl_reference: str
    prompts: int
    num_answers: int
    temperature: float
    seed: int
    rewards: dict[str, RewardInfo]
    policies: dict[str, PolicyResult]
    has_perplexity: bool
    frontier: Frontier | None
    examples: list[Example]
    versions: dict[str, Any]

    @property
    def groups(self) -> list[str]:
        """Groups of prompts that truthfulness is reported for."""
        measured = next((list(policy.truthfulness) for policy in self.policies.values() if policy.truthfulness), [])
        return measured[1:] or measured

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
