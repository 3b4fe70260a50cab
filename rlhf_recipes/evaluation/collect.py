"""All results of an evaluation, from the answers of its policies."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_recipes.core.files import REWARD_EVALUATION, read_json
from rlhf_recipes.core.provenance import versions
from rlhf_recipes.evaluation.measurement import Measurement, PolicySamples
from rlhf_recipes.evaluation.policy_results import measure_policy
from rlhf_recipes.evaluation.prompts import groups_of
from rlhf_recipes.evaluation.report.verdict import verdict
from rlhf_recipes.evaluation.types import EvaluationResults, Example, ExampleAnswer, Frontier, RewardInfo
from rlhf_recipes.generation.judges import ChatJudge, prompt_as_text
from rlhf_recipes.generation.policies import Policy
from rlhf_recipes.rewards.matching import kinds_of

import numpy as np
from datasets import Dataset


def collect_results(
    measurement: Measurement,
    policies: dict[str, Policy],
    samples: dict[str, PolicySamples],
    judge: str | ChatJudge | None,
    frontier: Frontier | None,
    texts: Dataset | None,
) -> EvaluationResults:
    """Measure every policy, compare it with the baseline, and state the verdict.

    Args:
        measurement: What all policies share.
        policies: By name.
        samples: Their answers, by name.
        judge: Decides win rates.
        frontier: Reward against KL.
        texts: Pretraining text, to measure perplexity on.
    """
    arguments = measurement.arguments
    baseline = arguments.compare_with
    results = EvaluationResults(
        verdict=[],
        compare_with=baseline,
        kl_reference=measurement.reference,
        prompts=len(measurement.rows),
        num_answers=arguments.num_answers,
        temperature=arguments.temperature,
        seed=arguments.seed,
        rewards={
            name: RewardInfo(
                trained=reward.trained, folder=reward.folder, about=reward.about, evaluation=_own_evaluation(reward.folder)
            )
            for name, reward in measurement.rewards.items()
        },
        policies={
            name: measure_policy(
                measurement, policy, samples[name], None if name == baseline else samples[baseline], judge, texts
            )
            for name, policy in policies.items()
        },
        has_perplexity=texts is not None,
        frontier=frontier,
        examples=_examples(measurement, samples),
        versions=versions(),
    )
    return replace(results, verdict=verdict(results))


def _examples(measurement: Measurement, samples: dict[str, PolicySamples]) -> list[Example]:
    """Return prompts with the first answer of every policy, as many of each group."""
    rows, arguments = measurement.rows, measurement.arguments
    groups = groups_of(rows, arguments.group_by)
    parts = {name: np.flatnonzero(mask) for name, mask in groups.items() if name != "all" or len(groups) == 1}
    count = -(-arguments.num_examples // len(parts))
    chosen = [(name, row) for name, places in parts.items() for row in places[:count].tolist()]
    return [_example(measurement, samples, group, row) for group, row in chosen[: arguments.num_examples]]


def _example(measurement: Measurement, samples: dict[str, PolicySamples], group: str, row: int) -> Example:
    entry, arguments = measurement.rows[row], measurement.arguments
    reference = entry.get("reference")
    comparable = reference and measurement.compares_references

    def first_answer(one: PolicySamples) -> ExampleAnswer:
        text = one.texts[row * arguments.num_answers]
        return ExampleAnswer(text=text, kind=kinds_of([text], [reference], arguments.abstentions)[0] if comparable else None)

    return Example(
        prompt=prompt_as_text(entry["prompt"]),
        reference=reference,
        group=None if group == "all" else group,
        answers={name: first_answer(one) for name, one in samples.items()},
    )


def _own_evaluation(folder: str | None) -> dict[str, Any] | None:
    """Read what recipes/reward.py measured of a reward model on held-out comparisons."""
    return read_json(Path(folder) / REWARD_EVALUATION[0]) or None if folder else None
