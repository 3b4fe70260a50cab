"""Answers against reference answers: truthfulness and calibration."""

from dataclasses import dataclass
from typing import Any

from rlhf_recipes.evaluation.estimates import estimate
from rlhf_recipes.evaluation.measurement import Measurement, PolicySamples
from rlhf_recipes.evaluation.metrics.calibration import calibration, calibration_difference
from rlhf_recipes.evaluation.metrics.intervals import Floats
from rlhf_recipes.evaluation.prompts import groups_of
from rlhf_recipes.evaluation.types import UNSET, CalibrationBin, CalibrationResult, Estimate
from rlhf_recipes.rewards.matching import KINDS, kinds_of

import numpy as np
from numpy.typing import NDArray


def compare_with_references(measurement: Measurement, samples: PolicySamples, baseline: PolicySamples | None) -> dict[str, Any]:
    """Return `truthfulness`, `over_abstained` and `calibration` of a `PolicyResult`.

    Each is for all prompts and for each group that has references.
    """
    arguments = measurement.arguments
    has_reference = np.array([bool((text or "").strip()) for text in measurement.rows["reference"]])
    groups = {name: rows & has_reference for name, rows in groups_of(measurement.rows, arguments.group_by).items()}
    groups = {name: rows for name, rows in groups.items() if rows.any()}
    kinds, other_kinds = (one and _kinds(measurement, one) for one in (samples, baseline))

    def share(kind: str, rows: NDArray[np.bool_]) -> Estimate:
        values, others = (None if one is None else (one == kind).astype(float)[rows] for one in (kinds, other_kinds))
        return estimate(values, others, share=True, seed=arguments.seed)

    truthfulness = {name: {kind: share(kind, rows) for kind in KINDS} for name, rows in groups.items()}
    result: dict[str, Any] = {"truthfulness": truthfulness}
    column = arguments.group_by
    if column in groups and f"not {column}" in groups:
        result["over_abstained"] = truthfulness[column]["abstained"]
    one, other = _calibration_inputs(samples, kinds), _calibration_inputs(baseline, other_kinds)
    if one is not None:
        result["calibration"] = {name: _calibration(one, other, rows, arguments.seed) for name, rows in groups.items()}
    return result


def _kinds(measurement: Measurement, samples: PolicySamples) -> NDArray[np.str_]:
    """Return (P, K) kinds of answers."""
    count = measurement.arguments.num_answers
    references = [text or "" for text in measurement.repeated("reference", count)]
    return np.array(kinds_of(samples.texts, references, measurement.arguments.abstentions)).reshape(-1, count)


@dataclass(frozen=True)
class CalibrationInputs:
    """A policy's answers as predictions, (P, K) each.

    Parameters:
        confidences: Probability of the answer.
        right: 1 or 0.
        counts: Whether the answer says something, and does not abstain.
        texts: Of the answers.
    """

    confidences: Floats
    right: Floats
    counts: NDArray[np.bool_]
    texts: NDArray[np.object_]

    def select(self, rows: NDArray[np.bool_]) -> tuple[Floats, Floats, list[int], list[str]]:
        """Return confidences, outcomes, prompt numbers and texts of rows (P,)."""
        chosen = self.counts & rows[:, None]
        return self.confidences[chosen], self.right[chosen], np.nonzero(chosen)[0].tolist(), self.texts[chosen].tolist()


def _calibration_inputs(samples: PolicySamples | None, kinds: NDArray[np.str_] | None) -> CalibrationInputs | None:
    """Return None where there are no answers, or no probabilities of them."""
    if samples is None or samples.logps is None:
        return None
    confidences, texts = np.minimum(np.exp(samples.logps), 1), np.array(samples.texts, dtype=object)
    return CalibrationInputs(
        confidences, (kinds == "right").astype(float), kinds != "abstained", texts.reshape(confidences.shape)
    )


def _calibration(
    one: CalibrationInputs, other: CalibrationInputs | None, rows: NDArray[np.bool_], seed: int
) -> CalibrationResult | None:
    """Return None where all answers abstain."""
    confidences, right, prompts, texts = one.select(rows)
    if not prompts:
        return None
    events = list(zip(prompts, texts, strict=True))  # an answer given twice has one outcome
    values = calibration(confidences, right, groups=prompts, events=events, seed=seed)
    difference = UNSET
    if other is not None and (other.counts & rows[:, None]).any():
        others, others_right, others_prompts, _ = other.select(rows)
        differences = calibration_difference(
            confidences, right, others, others_right, groups=prompts, other_groups=others_prompts, seed=seed
        )
        difference = {name: Estimate(**values) for name, values in differences.items()}
    bins = [CalibrationBin(**entry) for entry in values.pop("bins")]
    return CalibrationResult(**values, bins=bins, difference=difference)
