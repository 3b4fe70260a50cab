"""All that was measured in one mapping: what `metrics.json` holds, and the report shows."""

from pathlib import Path
from typing import Any

from rlhf_recipes.core.files import REWARD_EVALUATION, read_json
from rlhf_recipes.core.provenance import versions
from rlhf_recipes.evaluation.evaluate import Drawn, Measurement, describe, groups_of, lm_eval_results, perplexities
from rlhf_recipes.evaluation.report.verdict import verdict
from rlhf_recipes.generation.judges import ChatJudge, prompt_as_text
from rlhf_recipes.generation.policies import Policy
from rlhf_recipes.rewards.matching import kinds_of

import numpy as np
from datasets import Dataset


def collect(
    measurement: Measurement,
    policies: dict[str, Policy],
    drawn: dict[str, Drawn],
    judge: str | ChatJudge | None,
    frontier: dict[str, Any] | None,
    texts: Dataset | None,
) -> dict[str, Any]:
    """Everything about every policy, the verdict first; JSON-serialisable. docs/evaluation.md says what each key is.

    Args:
        measurement: what all policies have in common.
        policies: by name.
        drawn: their answers, by name.
        judge: decides who wins.
        frontier: from `measure.frontier`.
        texts: pretraining text, or None.
    """
    arguments = measurement.arguments
    rival = arguments.compare_with
    results = {
        name: describe(measurement, policy, drawn[name], None if name == rival else drawn[rival], judge)
        for name, policy in policies.items()
    }
    for name, value in (perplexities(measurement, policies, texts) if texts is not None else {}).items():
        results[name]["perplexity"] = value
    for name, value in (lm_eval_results(measurement, policies) if arguments.lm_eval_tasks else {}).items():
        results[name]["lm_eval"] = value
    metrics = {
        "compare_with": rival,
        "kl_reference": measurement.reference,
        "prompts": len(measurement.rows),
        "num_answers": arguments.num_answers,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "rewards": {
            name: {
                "trained": reward.trained,
                "folder": reward.folder,
                "about": reward.about,
                "evaluation": _own_evaluation(reward.folder),
            }
            for name, reward in measurement.rewards.items()
        },
        "policies": results,
        "has_perplexity": texts is not None,
        "frontier": frontier,
        "examples": examples(measurement, drawn),
        "versions": versions(),
    }
    return {"verdict": verdict(metrics), **metrics}


def examples(measurement: Measurement, drawn: dict[str, Drawn]) -> list[dict[str, Any]]:
    """Prompts with the first answer of every policy, as many of each group."""
    rows, arguments = measurement.rows, measurement.arguments
    groups = groups_of(rows, arguments.group_by)
    parts = {name: np.flatnonzero(mask) for name, mask in groups.items() if name != "all" or len(groups) == 1}
    share = -(-arguments.num_examples // len(parts))
    chosen = [(name, row) for name, places in parts.items() for row in places[:share].tolist()]
    return [_example(measurement, drawn, group, row) for group, row in chosen[: arguments.num_examples]]


def _example(measurement: Measurement, drawn: dict[str, Drawn], group: str, row: int) -> dict[str, Any]:
    entry, arguments = measurement.rows[row], measurement.arguments
    reference = entry.get("reference")
    known = reference and measurement.tells_truth

    def shown(one: Drawn) -> dict[str, Any]:
        text = one.texts[row * arguments.num_answers]
        return {"text": text, "kind": kinds_of([text], [reference], arguments.abstentions)[0] if known else None}

    return {
        "prompt": prompt_as_text(entry["prompt"]),
        "reference": reference,
        "group": None if group == "all" else group,
        "answers": {name: shown(one) for name, one in drawn.items()},
    }


def _own_evaluation(folder: str | None) -> dict[str, Any] | None:
    """What recipes/reward.py measured of a reward model on comparisons held out, where it did."""
    return read_json(Path(folder) / REWARD_EVALUATION[0]) or None if folder else None
