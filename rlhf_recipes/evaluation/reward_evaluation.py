"""A reward model on held-out comparisons: its numbers, and pictures of them."""

import itertools
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf_recipes.core.files import REWARD_EVALUATION, write_json, write_text
from rlhf_recipes.evaluation.metrics.calibration import preference_calibration
from rlhf_recipes.evaluation.metrics.intervals import codes_of
from rlhf_recipes.evaluation.metrics.scores import pair_accuracy, preferred, ranking_tau, score_distribution, score_length
from rlhf_recipes.evaluation.report.plots import reliability_diagram, score_histogram
from rlhf_recipes.evaluation.types import CalibrationBin
from rlhf_recipes.models.tokenizer import encode
from rlhf_recipes.rewards.reward_models import Ensemble, RewardModel

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase


class Scorer(Protocol):
    """A reward model, ensemble or baseline, with the tokenizer for lengths."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """Return the score of each completion."""


def measure_and_scale(
    rewards: Sequence[RewardModel],
    demonstrations: Dataset,
    held_out: Dataset | None,
    combine: str = "mean",
    uncertainty_coef: float = 1.0,
) -> dict[str, dict[str, Any]]:
    """Measure reward models on held-out comparisons, then store their scale.

    The mean and standard deviation of the scores of `demonstrations` (`prompt`, `completion`) become the scale. Several models
    are measured as an `Ensemble` too. Returns name -> result of `measure_reward`, nothing without `held_out`.

    Raises:
        RecipeError: If all demonstrations have one score.
    """
    results = {}
    for reward in rewards:
        if held_out is not None:
            results[reward.__name__] = measure_reward(reward, held_out)
        reward.calibrate(demonstrations["prompt"], demonstrations["completion"])
    if held_out is not None and len(rewards) > 1:
        ensemble = Ensemble(rewards, combine, uncertainty_coef)
        results[ensemble.__name__] = measure_reward(ensemble, held_out, scale=ensemble.scale)
    return results


def measure_reward(scorer: Scorer, rows: Dataset, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """Return `evaluate_reward` of a scorer on held-out rankings or preference pairs.

    `scale` is the factor that makes score differences log-odds of preference: 1 for raw scores, and for normalised scores the
    deviation that they were divided by.
    """
    pairs = "chosen" in rows.column_names
    completions = [[row["chosen"], row["rejected"]] if pairs else row["completions"] for row in rows]
    ranks = [[0, 1]] * len(rows) if pairs else list(rows["ranks"])
    prompts = [prompt for prompt, group in zip(rows["prompt"], completions, strict=True) for _ in group]
    answers = [answer for group in completions for answer in group]
    scores, lengths = iter(scorer(prompts, answers)), iter(_token_counts(scorer, prompts, answers))
    return evaluate_reward(
        [[scale * next(scores) for _ in group] for group in completions],
        ranks,
        [[next(lengths) for _ in group] for group in completions],
        groups=[repr(prompt) for prompt in rows["prompt"]],
        margins=rows["margin"] if "margin" in rows.column_names else None,
        seed=seed,
    )


def evaluate_reward(
    scores: Sequence[Sequence[float]],
    ranks: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[float]],
    *,
    groups: Sequence[Hashable] | None = None,
    margins: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure scores against held-out rankings. A pair is a ranking of two.

    Every two answers of different rank are a comparison. A ranking of K answers has up to K(K-1)/2, so long rankings weigh
    more in `accuracy` and `calibration`. In `tau` every ranking weighs the same.

    Args:
        scores: (K,) scores of each ranking. K may differ.
        ranks: (K,) human ranks of each ranking, lower being better.
        lengths: (K,) lengths of the answers, in tokens.
        groups: Prompt of each ranking. None: each has a prompt to itself.
        margins: For pairs only: how much better people found the chosen answer. Without them, differences of rank are taken
            if they vary.
        seed: Of all resampling.

    Returns:
        `accuracy` (`pair_accuracy`); `length_accuracy`: of preferring the longer answer; `tau` (`ranking_tau`); `calibration`
        (`preference_calibration`); `score_length`; `scores` (`score_distribution`).

    Raises:
        ValueError: No comparisons, different lengths, margins of rankings of more than two, or numbers that are not finite.
    """
    prompts = codes_of(groups, len(scores)).tolist()
    pairs = [  # ranking, better answer, worse answer
        (number, *sorted((one, other), key=row.__getitem__))
        for number, row in enumerate(ranks)
        for one, other in itertools.combinations(range(len(row)), 2)
        if row[one] != row[other]
    ]
    if not pairs:
        raise ValueError("There is nothing to compare: in every ranking all answers have the same rank.")
    chosen, rejected = ([scores[number][pair[side]] for number, *pair in pairs] for side in (0, 1))
    long, short = ([lengths[number][pair[side]] for number, *pair in pairs] for side in (0, 1))
    options = {"groups": [prompts[number] for number, *_ in pairs], "seed": seed}
    if margins is None:
        gaps = [ranks[number][worse] - ranks[number][better] for number, better, worse in pairs]
        human = gaps if len(set(gaps)) > 1 else None
    elif len(margins) != len(ranks) or any(len(row) != 2 for row in ranks):
        raise ValueError("`margins` need pairs: one number each, and no ranking of more than two answers.")
    else:
        human = [margins[number] for number, *_ in pairs]
    every = np.repeat(prompts, [len(row) for row in scores]).tolist()
    return {
        "accuracy": pair_accuracy(chosen, rejected, chosen_lengths=long, rejected_lengths=short, margins=human, **options),
        "length_accuracy": float(preferred(np.asarray(long), np.asarray(short)).mean()),
        "tau": ranking_tau(scores, ranks, groups=prompts, seed=seed),
        "calibration": preference_calibration(chosen, rejected, **options),
        "score_length": score_length(np.concatenate(scores), np.concatenate(lengths), groups=every),
        "scores": score_distribution(np.concatenate(scores)),
    }


def write_evaluation(folder: str | Path, results: dict[str, dict[str, Any]]) -> None:
    """Write `evaluation.json`, reliability diagrams and histograms.

    Existing ones are deleted first, even if there are no results: they belong to an earlier model.
    """
    folder = Path(folder)
    for path in [path for pattern in REWARD_EVALUATION for path in folder.glob(pattern)]:
        path.unlink()
    if not results:
        return
    for name, result in results.items():
        bins = [CalibrationBin(**entry) for entry in result["calibration"]["bins"]]
        write_text(folder / f"reliability-{name}.svg", reliability_diagram(bins, name))
        write_text(folder / f"scores-{name}.svg", score_histogram(result["scores"], name))
    write_json(folder / "evaluation.json", results)


def summary(name: str, result: dict[str, Any]) -> str:
    """Return a result of `measure_reward` in one line."""
    accuracy, calibration = result["accuracy"], result["calibration"]
    low, high = accuracy["interval"]
    correlation = result["score_length"]["spearman"]
    return (
        f"{name}: accuracy {accuracy['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {accuracy['n']} comparisons, "
        f"calibration error {calibration['ece']:.3f} ({calibration['ece_if_calibrated']:.3f} by chance), "
        f"Kendall's tau {result['tau']['tau']:.2f}, correlation of score and length "
        f"{'undefined' if correlation is None else f'{correlation:.2f}'}"
    )


def _token_counts(scorer: Scorer, prompts: list[Any], answers: list[Any]) -> list[int]:
    """Return the number of tokens of each answer."""
    bare: dict[str, int] = {}
    lengths = []
    for prompt, answer in zip(prompts, answers, strict=True):
        empty = "" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}]
        key = repr(prompt)
        if key not in bare:
            bare[key] = len(encode(scorer.tokenizer, prompt, empty))
        lengths.append(len(encode(scorer.tokenizer, prompt, answer)) - bare[key])
    return lengths
