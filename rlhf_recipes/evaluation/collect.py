"""All results of an evaluation, from the answers of its policies."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rlhf_recipes.core.files import ANSWERS, REWARD_EVALUATION, read_json, write_text
from rlhf_recipes.core.provenance import versions
from rlhf_recipes.core.warning_log import warnings_so_far
from rlhf_recipes.evaluation.estimates import win_rate_of
from rlhf_recipes.evaluation.measurement import Measurement, PolicySamples
from rlhf_recipes.evaluation.policy_checks import check_answers, check_changes, read_training
from rlhf_recipes.evaluation.policy_results import contains, measure_policy
from rlhf_recipes.evaluation.prompts import groups_of
from rlhf_recipes.evaluation.report.details import details
from rlhf_recipes.evaluation.report.standing import leader_of
from rlhf_recipes.evaluation.report.verdict import verdict
from rlhf_recipes.evaluation.types import UNSET, EvaluationResults, Example, ExampleAnswer, Frontier, RewardInfo
from rlhf_recipes.generation.judges import ChatJudge, prompt_as_text
from rlhf_recipes.generation.policies import Policy
from rlhf_recipes.rewards.matching import accepted_answers, kinds_of

import numpy as np
from datasets import Dataset


def collect_results(
    measurement: Measurement,
    policies: dict[str, Policy],
    samples: dict[str, PolicySamples],
    judge: str | ChatJudge | None,
    frontier: Frontier | None,
    texts: Dataset | None,
    same: Mapping[str, str],
) -> EvaluationResults:
    """Measure every policy, compare it with the baseline, and state the verdict.

    `same` maps policies to others of exactly their weights.
    """
    arguments = measurement.arguments
    baseline = arguments.compare_with
    measured = {}
    for name, policy in policies.items():
        others = None if name == baseline else samples[baseline]
        result = measure_policy(measurement, policy, samples[name], others, judge, texts)
        measured[name] = replace(result, training=read_training(policy.folder), same_as=same.get(name, UNSET))
    rewards = {}
    for name, reward in measurement.rewards.items():
        evaluation = read_json(Path(reward.folder) / REWARD_EVALUATION[0]) or None if reward.folder else None
        rewards[name] = RewardInfo(
            trained=reward.trained,
            folder=reward.folder,
            about=reward.about,
            evaluation=evaluation,
            training=read_training(reward.folder),
        )
    check_answers(samples, policies, arguments)
    check_changes(samples, measurement.reference, same)
    results = EvaluationResults(
        verdict=[],
        compare_with=baseline,
        kl_reference=measurement.reference,
        prompts=len(measurement.rows),
        num_answers=arguments.num_answers,
        temperature=arguments.temperature,
        seed=arguments.seed,
        rewards=rewards,
        policies=measured,
        has_perplexity=texts is not None,
        frontier=frontier,
        examples=_examples(measurement, samples),
        versions=versions(),
        group_names=arguments.group_names,
    )
    results = _compare_with_leader(results, samples, judge)
    return replace(results, verdict=verdict(results), details=details(results), warnings=warnings_so_far())


def _compare_with_leader(
    results: EvaluationResults, samples: Mapping[str, PolicySamples], judge: str | ChatJudge | None
) -> EvaluationResults:
    """Add the leader's wins against every other policy, where the judge is a reward."""
    leader = leader_of(results)
    if leader is None or not isinstance(judge, str):
        return results
    scores = samples[leader].scores[judge]
    policies = {
        name: replace(policy, leader_wins=win_rate_of(scores, samples[name].scores[judge], results.seed, judge))
        if name not in (leader, results.compare_with)
        else policy
        for name, policy in results.policies.items()
    }
    return replace(results, policies=policies)


def _examples(measurement: Measurement, samples: dict[str, PolicySamples]) -> list[Example]:
    """Return prompts with the first answer of every policy, as many of each group."""
    rows, arguments = measurement.rows, measurement.arguments
    groups = groups_of(rows, arguments.group_by)
    parts = {name: np.flatnonzero(mask) for name, mask in groups.items() if name != "all" or len(groups) == 1}
    count = -(-arguments.num_examples // len(parts))
    chosen = [(name, row) for name, places in parts.items() for row in places[:count].tolist()]
    examples = []
    for group, row in chosen[: arguments.num_examples]:
        reference = rows[row].get("reference")
        accepted = accepted_answers(reference)
        texts = {name: one.texts[row * arguments.num_answers] for name, one in samples.items()}
        kinds = _kinds(measurement, list(texts.values()), accepted)
        answers = {name: ExampleAnswer(text=text, kind=kind) for (name, text), kind in zip(texts.items(), kinds, strict=True)}
        shown = None if group == "all" else group
        reference = " / ".join(accepted) if isinstance(reference, list) else reference
        examples.append(Example(prompt=prompt_as_text(rows[row]["prompt"]), reference=reference, group=shown, answers=answers))
    return examples


def _kinds(measurement: Measurement, texts: list[str], accepted: list[str]) -> list[str | None]:
    """Return kinds of answers to one prompt, None without a reference.

    An answer that is made up and holds an accepted one "contains_reference".
    """
    if not accepted or not measurement.compares_references:
        return [None] * len(texts)
    kinds = kinds_of(texts, [accepted] * len(texts), measurement.arguments.abstentions)
    return [
        "contains_reference" if kind == "made_up" and contains(text, accepted) else kind
        for kind, text in zip(kinds, texts, strict=True)
    ]


def write_answers(folder: str | Path, measurement: Measurement, samples: dict[str, PolicySamples]) -> None:
    """Write all answers to `answers.jsonl`, a line for each policy and prompt.

    Each answer has its text, its kind as in the report, whether it ended, its log-probability in nats (of best-of-n none) and
    its scores.
    """
    count = measurement.arguments.num_answers
    lines = []
    for policy, one in samples.items():
        for row, content in enumerate(measurement.rows):
            places = slice(row * count, (row + 1) * count)
            texts, accepted = one.texts[places], accepted_answers(content.get("reference"))
            kinds = _kinds(measurement, texts, accepted)
            logps = [None] * count if one.logps is None else one.logps[row].tolist()
            scores = [
                {name: None if math.isnan(values[row, turn]) else values[row, turn] for name, values in one.scores.items()}
                for turn in range(count)
            ]
            columns = zip(texts, kinds, [answer.ended for answer in one.answers[places]], logps, scores, strict=True)
            answers = [dict(zip(("text", "kind", "ended", "logp", "scores"), values, strict=True)) for values in columns]
            lines.append(json.dumps({"policy": policy, **content, "answers": answers}, ensure_ascii=False, default=str) + "\n")
    write_text(Path(folder) / ANSWERS, "".join(lines))
