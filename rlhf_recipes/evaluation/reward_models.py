"""A reward model on held-out comparisons: its numbers, and the pictures of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf_recipes.core.files import REWARD_EVALUATION, write_json, write_text
from rlhf_recipes.evaluation.metrics.preference import evaluate_reward
from rlhf_recipes.evaluation.report.plots import reliability_diagram, score_histogram
from rlhf_recipes.models.tokenizer import encode
from rlhf_recipes.rewards.reward_models import Ensemble, RewardModel

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


class Measurable(Protocol):
    """What can be measured: a `Scorer`, or anything else that scores completions and has a tokenizer to count them by."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """The score of each completion."""


def measure_and_scale(
    rewards: Sequence[RewardModel],
    demonstrations: Dataset,
    held_out: Dataset | None,
    combine: str = "mean",
    uncertainty_coef: float = 1.0,
) -> dict[str, dict[str, Any]]:
    """Gives reward models the scale that is stored beside them; returns, by name, what held-out comparisons say of them.

    Args:
        rewards: the members of an ensemble, or one model.
        demonstrations: with `prompt` and `completion`; of them come the mean and the standard deviation of the scores.
        held_out: as in `measure_reward`; without it nothing is measured.
        combine: as of `Ensemble`: several are measured as one, too.
        uncertainty_coef: likewise.

    Raises:
        RecipeError: if the demonstrations score alike.
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


def measure_reward(scorer: Measurable, rows: Dataset, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """What `evaluate_reward` says of a scorer on held-out comparisons; lengths are those of the completions, in tokens.

    Args:
        scorer: a reward model, an ensemble, or a baseline.
        rows: of `rlhf_recipes.data`'s kinds "ranking" or "preference".
        seed: of the resampling.
        scale: what makes the scores' differences log-odds of preference: 1 for raw scores; for normalised ones the deviation
            that they were divided by.
    """
    pairs = "chosen" in rows.column_names
    groups, completions, ranks = [], [], []
    for row in rows:
        groups.append(repr(row["prompt"]))
        completions.append([row["chosen"], row["rejected"]] if pairs else row["completions"])
        ranks.append([0, 1] if pairs else row["ranks"])
    counts = [len(answers) for answers in completions]
    prompts = [row["prompt"] for row, count in zip(rows, counts, strict=True) for _ in range(count)]
    answers = [answer for group in completions for answer in group]
    scores = iter([scale * score for score in scorer(prompts, answers)])
    lengths = iter(_lengths(scorer, prompts, answers))
    return evaluate_reward(
        [[next(scores) for _ in range(count)] for count in counts],
        ranks,
        [[next(lengths) for _ in range(count)] for count in counts],
        groups=groups,
        margins=rows["margin"] if "margin" in rows.column_names else None,
        seed=seed,
    )


def write_evaluation(folder: str | Path, results: dict[str, dict[str, Any]]) -> None:
    """Writes `evaluation.json` with the results by name, and of each a reliability diagram and a histogram as SVG.

    Those that are there go, also where there is nothing to write: they are of another model.
    """
    folder = Path(folder)
    for path in [path for pattern in REWARD_EVALUATION for path in folder.glob(pattern)]:
        path.unlink()
    if not results:
        return
    for name, result in results.items():
        write_text(folder / f"reliability-{name}.svg", reliability_diagram(result["calibration"]["bins"], name))
        write_text(folder / f"scores-{name}.svg", score_histogram(result["scores"], name))
    write_json(folder / "evaluation.json", results)


def summary(name: str, result: dict[str, Any]) -> str:
    """The result in one line."""
    accuracy, calibration = result["accuracy"], result["calibration"]
    low, high = accuracy["interval"]
    correlation = result["score_length"]["spearman"]
    return (
        f"{name}: accuracy {accuracy['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {accuracy['n']} comparisons, "
        f"calibration error {calibration['ece']:.3f} ({calibration['ece_if_calibrated']:.3f} by chance), "
        f"Kendall's tau {result['tau']['tau']:.2f}, correlation of score and length "
        f"{'undefined' if correlation is None else f'{correlation:.2f}'}"
    )


def _lengths(scorer: Measurable, prompts: list[Any], answers: list[Any]) -> list[int]:
    """Tokens of each answer: those of the whole less those of the prompt alone."""
    bare = {}
    lengths = []
    for prompt, answer in zip(prompts, answers, strict=True):
        empty = "" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}]
        key = repr(prompt)
        if key not in bare:
            bare[key] = len(encode(scorer.tokenizer, prompt, empty))
        lengths.append(len(encode(scorer.tokenizer, prompt, answer)) - bare[key])
    return lengths
