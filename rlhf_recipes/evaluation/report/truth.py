"""What a policy answers in sentences, where there is truth."""

from rlhf_recipes.evaluation.estimates import is_insignificant
from rlhf_recipes.evaluation.report.standing import ranked
from rlhf_recipes.evaluation.report.words import alone, listed, of_answers, out_of
from rlhf_recipes.evaluation.types import EvaluationResults

CHANCE = ", which may be chance"
_VERBS = {"right": ("is right", "are right"), "abstained": ("abstains", "abstain"), "made_up": ("is made up", "are made up")}


def answers_of(name: str, results: EvaluationResults) -> str | None:
    """Return how many answers of a policy are of each kind, beside the baseline's.

    Where prompts are split by what the model could know: what is made up of the rest, and what it knows.
    """
    if not results.policies[name].truthfulness:
        return None
    group = results.could_know
    if group is None:
        return f"Of {name}'s {_counts(name, 'all', _VERBS, results)}."
    unknown = f"not {group}"
    made_up = of_answers(results.policies[name].truthfulness[unknown]["made_up"], results.num_answers)
    return (
        f"{name} makes things up in {made_up} answers {results.words_for(unknown)}"
        f"{_beside(name, unknown, 'made_up', results)}. "
        f"Of {_counts(name, group, ('right', 'abstained'), results)}."
    )


def _counts(name: str, group: str, kinds: tuple[str, ...] | dict[str, tuple[str, str]], results: EvaluationResults) -> str:
    """Return "100 answers, 99 are right (sft: 75) and 1 abstains (sft: 22)"."""
    shares = results.policies[name].truthfulness[group]
    all_chance = name != results.compare_with and all(is_insignificant(shares[kind].difference or None) for kind in kinds)
    parts = []
    for kind in kinds:
        count = alone(shares[kind], results.num_answers)
        verb = _VERBS[kind][count not in ("1", "fewer than 1")]
        parts.append(f"{count} {verb}{_beside(name, group, kind, results, note_chance=not all_chance)}")
    answers = f"{out_of(shares['right'], results.num_answers)} answers {results.words_for(group)}".rstrip()
    return f"{answers}, {listed(parts)}{'; all of this may be chance' if all_chance else ''}"


def _beside(name: str, group: str, kind: str, results: EvaluationResults, note_chance: bool = True) -> str:
    """Return the baseline's number, and the least that is made up, in brackets."""
    baseline, answers = results.compare_with, results.num_answers
    shares = {one: policy.truthfulness[group][kind] for one, policy in results.policies.items() if policy.truthfulness}
    if name == baseline or baseline not in shares:
        return ""
    chance = CHANCE if note_chance and is_insignificant(shares[name].difference or None) else ""
    least = min((one for one in ranked(results) if one in shares), key=lambda one: shares[one].mean)
    fewer = kind == "made_up" and least != baseline and shares[least].mean < shares[name].mean
    others = f"; the least: {least}, {alone(shares[least], answers)}" if fewer else ""
    return f" ({baseline}: {alone(shares[baseline], answers)}{chance}{others})"
