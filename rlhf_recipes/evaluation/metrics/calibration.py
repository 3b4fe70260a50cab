"""Whether predictions of probability p come true with frequency p.

Results are JSON-serialisable: an undefined number is None, never NaN.
"""

from collections.abc import Hashable, Sequence
from typing import Any

from rlhf_recipes.evaluation.metrics.base import NUMBER, metric
from rlhf_recipes.evaluation.metrics.intervals import RESAMPLES, Floats, Integers, codes_of, columns_of
from rlhf_recipes.evaluation.metrics.scores import bin_of, preferred, share_of_group

import numpy as np
from numpy.typing import ArrayLike

_BLOCK = 100  # resamples at once, which bounds the memory
_SIMULATIONS = 200
_TINY = 1e-15


def calibration(
    confidences: ArrayLike,
    outcomes: ArrayLike,
    *,
    bins: int = 10,
    low: float = 0.0,
    groups: Sequence[Hashable] | None = None,
    events: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the calibration of any predictions of yes or no.

    With bins b of n_b predictions: ECE = Σ n_b/N |frequency_b - mean confidence_b| (Naeini et al. 2015, Guo et al. 2017). It
    exceeds 0 even for perfect predictions, the more so the fewer they are. `ece_if_calibrated` says by how much: the mean over
    outcomes drawn from the confidences themselves (Vaicenavicius et al. 2019), one for each of `events`.

    For comparisons, do not take sigmoid(chosen - rejected) with outcomes that are all 1: every comparison is in the same order,
    so every frequency is 1. Take `winner_confidence` or `preference_calibration`.

    Args:
        confidences: (N,) predicted probabilities, in [low, 1].
        outcomes: (N,) 0 or 1, or in between: .5 stands for half a 0 and half a 1.
        bins: Number of bins (a, b], which divide [low, 1] evenly.
        low: Lowest possible confidence: 0.5 for the winner of a pair.
        groups: (N,) group of each prediction, for intervals. None: predictions are independent.
        events: (N,) what each prediction is about. Equal events have one outcome, as when a model gives an answer twice.
        seed: Of the resampling.

    Returns:
        `ece`, `ece_if_calibrated`; `brier`: the mean of (p - outcome)²; `log_loss`: the mean of -log of the probability of the
        outcome, with p kept 1e-15 away from 0 and 1; `accuracy` and `confidence`: means; `n`; `bins`: of each non-empty bin
        `low`, `high`, `confidence`, `n`, `accuracy`, `interval`.

    Raises:
        ValueError: Nothing to judge, different lengths, or numbers out of range.
    """
    confidences, outcomes = _checked_predictions(confidences, outcomes, low)
    codes = codes_of(groups, len(confidences))
    edges = np.linspace(low, 1, bins + 1)
    places = bin_of(confidences, edges[1:-1])
    generator = np.random.default_rng(seed)
    numbers = codes_of(events, len(confidences), "events")
    simulated = (generator.random(numbers.max() + 1)[numbers] < confidences for _ in range(_SIMULATIONS))
    clipped = np.clip(confidences, _TINY, 1 - _TINY)
    return {
        "ece": _ece(confidences, outcomes, places),
        "ece_if_calibrated": float(np.mean([_ece(confidences, outcome, places) for outcome in simulated])),
        "brier": float(_squares(confidences, outcomes).mean()),
        "log_loss": float(np.mean(-outcomes * np.log(clipped) - (1 - outcomes) * np.log1p(-clipped))),
        "accuracy": float(outcomes.mean()),
        "confidence": float(confidences.mean()),
        "n": len(confidences),
        "bins": [
            {"low": float(edges[place]), "high": float(edges[place + 1]), "confidence": float(confidences[rows].mean())}
            | share_of_group(outcomes[rows], codes[rows], seed)
            for place in np.unique(places)
            for rows in [places == place]
        ],
    }


Calibration = metric(
    "Calibration",
    calibration,
    """Expected calibration error, Brier score, log loss, and the bins of a reliability diagram.

    `predictions` are probabilities of a yes, `references` the outcomes, 1 or 0. Options as in `calibration`. For comparisons,
    `winner_confidence` makes both from scores.

        >>> Calibration().compute(predictions=[0.75, 0.75, 0.75, 0.75], references=[1, 1, 1, 0])["ece"]
        0.0
    """,
    predictions=NUMBER,
    references=NUMBER,
)


def winner_confidence(chosen: ArrayLike, rejected: ArrayLike) -> tuple[Floats, Floats]:
    """Return the confidence in each predicted winner, and whether it was right.

    From (N,) scores of chosen and rejected answers: (N,) sigmoid(|chosen - rejected|), in [0.5, 1], the probability that a
    Bradley-Terry model gives the answer with the higher score; (N,) 1 where that answer was chosen, 0 where it was rejected,
    0.5 where the scores tie.
    """
    chosen, rejected = columns_of(chosen=chosen, rejected=rejected)
    return 1 / (1 + np.exp(-np.abs(chosen - rejected))), preferred(chosen, rejected)


def preference_calibration(chosen: ArrayLike, rejected: ArrayLike, **options: Any) -> dict[str, Any]:
    """Measure the calibration of the predicted winners of comparisons.

    Takes (N,) scores, and the options of `calibration`. Bins are on [0.5, 1]. `log_loss` is the loss of a reward model, the
    mean of -log sigmoid(chosen - rejected).
    """
    result = calibration(*winner_confidence(chosen, rejected), low=0.5, **options)
    return result | {"log_loss": float(np.logaddexp(0, np.subtract(rejected, chosen, dtype=np.float64)).mean())}


def calibration_difference(
    predictions: tuple[ArrayLike, ArrayLike, Sequence[Hashable]],
    others: tuple[ArrayLike, ArrayLike, Sequence[Hashable]],
    bins: int = 10,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Return how far ECE and Brier score exceed those of other predictions.

    Chance adds to ECE, the more so the fewer and the better the predictions, and it adds to a resample's once more. So the
    plain difference may be all chance, with a bootstrap interval that excludes 0. Here the sign of each bin's gap comes
    from one half of the prompts, drawn by `seed`, and the gap from the other half, and the reverse. The result is 0 on
    average for perfect predictions, and not quite the difference of two `ece`.

    Both predictions are (N,) probabilities in [0, 1], (N,) outcomes from 0 to 1, and (N,) prompts; N may differ.

    Returns:
        `ece` and `brier`, each with `mean`, `interval` (95%; None where all resamples agree) and `n`, the prompts.

    Raises:
        ValueError: Nothing to judge, different lengths, or numbers out of range.
    """
    one, other = _checked_predictions(*predictions[:2]), _checked_predictions(*others[:2])
    split = len(one[0])
    codes = codes_of([*predictions[2], *others[2]], split + len(other[0]))
    prompts, generator = int(codes.max()) + 1, np.random.default_rng(seed)
    folds = generator.permutation(prompts) % 2
    sides = [_sums_by_prompt(*one, codes[:split], prompts, bins), _sums_by_prompt(*other, codes[split:], prompts, bins)]

    def differences(weights: Floats) -> Floats:
        return np.subtract(*(_errors(weights, folds, *side) for side in sides))

    chances = np.full(prompts, 1 / prompts)
    blocks = [differences(generator.multinomial(prompts, chances, _BLOCK)) for _ in range(RESAMPLES // _BLOCK)]
    resampled, means = np.concatenate(blocks), differences(np.ones((1, prompts)))[0]
    resampled = resampled[~np.isnan(resampled).any(1)]  # a resample may have no predictions on one side
    intervals = [np.quantile(values, (0.025, 0.975)).tolist() if np.ptp(values) else None for values in resampled.T]
    return {
        name: {"mean": float(mean), "interval": interval, "n": prompts}
        for name, mean, interval in zip(("ece", "brier"), means, intervals, strict=True)
    }


def _sums_by_prompt(confidences: Floats, outcomes: Floats, codes: Integers, prompts: int, bins: int) -> tuple[Floats, ...]:
    """Return (outcome - confidence), (P, bins), squares, (P,), and counts, (P,)."""
    places = codes * bins + bin_of(confidences, np.linspace(0, 1, bins + 1)[1:-1])
    gaps = np.bincount(places, outcomes - confidences, prompts * bins).reshape(prompts, bins)
    return gaps, np.bincount(codes, _squares(confidences, outcomes), prompts), np.bincount(codes, minlength=prompts)


def _errors(weights: Floats, folds: Integers, gaps: Floats, squares: Floats, counts: Floats) -> Floats:
    """Return cross-fitted ECE and Brier score, (B, 2), for weights (B, P)."""
    first, second = (weights[:, folds == fold] @ gaps[folds == fold] for fold in (0, 1))
    error = (np.sign(second) * first + np.sign(first) * second).sum(1)
    total = weights @ counts
    sums = np.stack([error, weights @ squares], 1)
    return np.divide(sums, total[:, None], out=np.full_like(sums, np.nan), where=total[:, None] > 0)


def _ece(confidences: Floats, outcomes: Floats, places: Integers) -> float:
    return float(np.abs(np.bincount(places, weights=outcomes - confidences)).sum() / len(places))


def _squares(confidences: Floats, outcomes: Floats) -> Floats:
    """Return expected squares of (confidence - outcome), (N,)."""
    return outcomes * (1 - confidences) ** 2 + (1 - outcomes) * confidences**2


def _checked_predictions(confidences: ArrayLike, outcomes: ArrayLike, low: float = 0.0) -> list[Floats]:
    columns = columns_of(confidences=confidences, outcomes=outcomes)
    for name, column, least in zip(("confidences", "outcomes"), columns, (low, 0.0), strict=True):
        bad = np.flatnonzero((column < least) | (column > 1))
        if len(bad):
            raise ValueError(f"`{name}` must be in [{least}, 1], but entry {bad[0]} is {column[bad[0]]}.")
    return columns
