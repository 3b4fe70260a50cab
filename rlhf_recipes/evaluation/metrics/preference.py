"""How well scores agree with human preferences: accuracy, Kendall's tau, calibration, correlation with length, distribution.

Pure functions of plain lists and arrays, an `evaluate.Metric` around each, and `evaluate_reward`, which composes them. Results
are JSON-serialisable: a number that is undefined (the correlation with a constant) is None, never NaN.

`N` below is the number of comparisons or answers, `K` that of the answers of one ranking. Comparisons of one ranking, or of one
prompt, are not independent: `groups` names the prompt or ranking of each, and intervals are then of whole groups, resampled.
"""

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Literal

from rlhf_recipes.evaluation.metrics.intervals import (
    RESAMPLES,
    Floats,
    Integers,
    check_finite,
    codes_of,
    columns_of,
    mean_interval,
    metric_info,
    share_interval,
)

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike

_BLOCK = 100  # resamples at once, which bounds the memory
_SIMULATIONS = 200
_TINY = 1e-15
_NUMBER = datasets.Value("float64")


# --- Accuracy on comparisons -----------------------------------------------------------------------------


def pair_accuracy(
    chosen: ArrayLike,
    rejected: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
    margins: ArrayLike | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The share of comparisons in which the chosen answer has the higher score; a tie counts one half.

    Args:
        chosen: (N,) scores of the chosen answers.
        rejected: (N,) scores of the rejected ones.
        groups: (N,) what each comparison belongs to; None: they are independent.
        chosen_lengths: (N,) lengths of the chosen answers; with `rejected_lengths`, adds `by_length`.
        rejected_lengths: (N,) lengths of the rejected answers.
        margins: (N,) how much better people found the chosen answer; adds `by_human_margin`.
        seed: of the resampling.

    Returns:
        `accuracy`, `interval` (95%: see `share_interval`), `n`, `groups`, `ties`; `by_predicted_margin`: the same by quartile
        of |chosen - rejected|, equal margins together; `by_human_margin`: by quartile of `margins`; `by_length`: where the
        chosen answer is the longer one, the shorter one, or neither.

    Raises:
        ValueError: nothing to compare, lists of different lengths, or numbers that are not finite.
    """
    chosen, rejected = columns_of(chosen=chosen, rejected=rejected)
    codes = codes_of(groups, len(chosen))
    right = _credit(chosen, rejected)

    def share(rows: Any) -> dict[str, Any]:
        return _share(right[rows], codes[rows], seed)

    def by_quartile(values: Floats) -> list[dict[str, Any]]:
        quartile = _cut(values, _quantiles(values, 4))
        slices = [quartile == number for number in np.unique(quartile)]
        return [{"low": float(values[rows].min()), "high": float(values[rows].max())} | share(rows) for rows in slices]

    result = share(slice(None)) | {"groups": int(codes.max()) + 1, "ties": int((chosen == rejected).sum())}
    result["by_predicted_margin"] = by_quartile(np.abs(chosen - rejected))
    if margins is not None:
        result["by_human_margin"] = by_quartile(columns_of(chosen=chosen, margins=margins)[1])
    if chosen_lengths is not None or rejected_lengths is not None:
        lengths = columns_of(chosen=chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
        longer = np.sign(lengths[1] - lengths[2])
        result["by_length"] = {
            name: share(longer == sign) for name, sign in (("chosen_longer", 1), ("chosen_shorter", -1), ("same_length", 0))
        }
    return result


class PairAccuracy(evaluate.Metric):
    """Accuracy of scores on comparisons, with a 95% interval, by margin and by length.

    `predictions` are the scores of the chosen answers, `references` those of the rejected ones; options as in `pair_accuracy`.

        >>> PairAccuracy().compute(predictions=[2.0, 0.5], references=[1.0, 0.5])["accuracy"]
        0.75
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self, _NUMBER)

    def _compute(self, predictions: list[float], references: list[float], **options: Any) -> dict[str, Any]:
        return pair_accuracy(predictions, references, **options)


# --- Agreement with rankings -----------------------------------------------------------------------------


def kendall_tau(first: ArrayLike, second: ArrayLike) -> float | None:
    """Kendall's tau-b of two lists of shape (K,); None where one of them is constant (Kendall 1945).

    (concordant - discordant) / √((pairs not tied in the first)(pairs not tied in the second)).
    """
    first, second = columns_of(first=first, second=second)
    signs = np.sign(first[:, None] - first), np.sign(second[:, None] - second)
    untied = math.sqrt(np.abs(signs[0]).sum() * np.abs(signs[1]).sum())
    return float((signs[0] * signs[1]).sum() / untied) if untied else None


def ranking_tau(
    scores: Sequence[ArrayLike], ranks: Sequence[ArrayLike], *, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> dict[str, Any]:
    """The mean over rankings of Kendall's tau-b between scores and human ranks; every ranking counts the same, whatever its K.

    A ranking whose scores all tie counts as 0, no agreement. One whose human ranks all tie says nothing and is left out.

    Args:
        scores: of each ranking, (K,) scores; K may differ.
        ranks: of each ranking, (K,) human ranks, lower being better.
        groups: the prompt of each ranking; None: they are independent.
        seed: of the resampling.

    Returns:
        `tau` and its 95% bootstrap `interval` (None where every group has the same tau, so that resampling says nothing);
        `rankings`: how many count; `tied_scores` of these; `tied_ranks`: how many were left out.

    Raises:
        ValueError: no rankings, or lists of different lengths.
    """
    _check_rankings(scores=scores, ranks=ranks)
    codes = codes_of(groups, len(scores))
    told = [number for number, row in enumerate(ranks) if np.ptp(row)]
    taus = [kendall_tau(scores[number], np.negative(ranks[number])) for number in told]
    result = {"tau": None, "interval": None, "rankings": len(told)}
    if told:
        values = np.array([tau or 0.0 for tau in taus])
        result |= {"tau": float(values.mean()), "interval": mean_interval(values, codes[told], seed)}
    return result | {"tied_scores": taus.count(None), "tied_ranks": len(scores) - len(told)}


class RankingTau(evaluate.Metric):
    """Kendall's tau-b between scores and human ranks, as a mean over rankings.

    `predictions` are lists of scores, one a ranking, and `references` lists of ranks, lower being better; options as in
    `ranking_tau`.

        >>> RankingTau().compute(predictions=[[3.0, 2.0, 1.0], [0.0, 1.0]], references=[[1, 2, 3], [1, 2]])["tau"]
        0.0
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self, datasets.List(_NUMBER))

    def _compute(self, predictions: list[list[float]], references: list[list[float]], **options: Any) -> dict[str, Any]:
        return ranking_tau(predictions, references, **options)


# --- Calibration -----------------------------------------------------------------------------------------


def calibration(
    confidences: ArrayLike,
    outcomes: ArrayLike,
    *,
    bins: int = 10,
    binning: Literal["width", "mass"] = "width",
    low: float = 0.0,
    groups: Sequence[Hashable] | None = None,
    events: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Whether what is predicted with probability p happens with frequency p, for any predictions of yes or no.

    With bins b of n_b predictions: ECE = Σ n_b/N |frequency_b - mean confidence_b| (Naeini et al. 2015, Guo et al. 2017). It
    is above 0 for perfect predictions too, the more so the fewer they are: `ece_if_calibrated` says how much, as the mean over
    outcomes drawn from the confidences themselves (Vaicenavicius et al. 2019), one for each of `events`.

    For comparisons, do not take sigmoid(chosen - rejected) and outcomes that are all 1: with every comparison in the same
    order, a frequency can only be 1. Take `winner_confidence`, or `preference_calibration`.

    Args:
        confidences: (N,) predicted probabilities, in [low, 1].
        outcomes: (N,) 0 or 1, or in between: .5 stands for half a 0 and half a 1.
        bins: how many.
        binning: `"width"`: bins divide [low, 1] evenly, (a, b] each; `"mass"`: each has the same number of predictions, except
            that equal ones stay together (Nguyen and O'Connor 2015).
        low: the lowest confidence there can be: 0.5 for that in the winner of a pair.
        groups: (N,) what each prediction belongs to; None: they are independent.
        events: (N,) what each prediction is of. Equal ones have one outcome, as where a model gives an answer twice; None: each
            has its own.
        seed: of the resampling.

    Returns:
        `ece`, `ece_if_calibrated`; `brier`: the mean of (p - outcome)²; `log_loss`: the mean of -log of the probability of the
        outcome, with p kept 1e-15 away from 0 and 1; `accuracy` and `confidence`: means; `n`; `bins`: of each that is not
        empty `low`, `high`, `n`, `confidence`, `accuracy`, `interval`.

    Raises:
        ValueError: nothing to judge, lists of different lengths, numbers out of range, no bins.
    """
    confidences, outcomes = _checked_predictions(low, confidences=confidences, outcomes=outcomes)
    if bins < 1 or binning not in ("width", "mass"):
        raise ValueError(f"`bins` must be positive and `binning` 'width' or 'mass', not {bins} and {binning!r}.")
    codes = codes_of(groups, len(confidences))
    if binning == "width":
        edges = np.linspace(low, 1, bins + 1)
    else:
        edges = np.array([confidences.min(), *_quantiles(confidences, bins), confidences.max()])
    places = _cut(confidences, edges[1:-1])
    generator = np.random.default_rng(seed)
    numbers = codes_of(events, len(confidences), "events")
    drawn = (generator.random(numbers.max() + 1)[numbers] < confidences for _ in range(_SIMULATIONS))
    clipped = np.clip(confidences, _TINY, 1 - _TINY)
    return {
        "ece": _ece(confidences, outcomes, places),
        "ece_if_calibrated": float(np.mean([_ece(confidences, outcome, places) for outcome in drawn])),
        "brier": float(_squares(confidences, outcomes).mean()),
        "log_loss": float(np.mean(-outcomes * np.log(clipped) - (1 - outcomes) * np.log1p(-clipped))),
        "accuracy": float(outcomes.mean()),
        "confidence": float(confidences.mean()),
        "n": len(confidences),
        "bins": [
            {"low": float(edges[place]), "high": float(edges[place + 1]), "confidence": float(confidences[rows].mean())}
            | _share(outcomes[rows], codes[rows], seed)
            for place in np.unique(places)
            for rows in [places == place]
        ],
    }


def calibration_difference(
    confidences: ArrayLike,
    outcomes: ArrayLike,
    other_confidences: ArrayLike,
    other_outcomes: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    other_groups: Sequence[Hashable] | None = None,
    bins: int = 10,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """How far ECE and Brier score of predictions lie above those of others on the same prompts.

    Chance adds to ECE, the more so the fewer predictions there are and the better they are, and to a resample's once more: the
    plain difference can be all chance, and its bootstrap surer of it than of anything. So here the sign of each bin's gap is
    read off one half of the prompts, drawn by `seed`, and the gap off the other half, and the reverse. That is 0 on average for
    perfect predictions, and not quite the difference of two `ece`.

    Args:
        confidences: (N,) predicted probabilities, in [0, 1].
        outcomes: (N,) 0 or 1, or in between.
        other_confidences: (M,) of the other predictions.
        other_outcomes: (M,) likewise.
        groups: (N,) the prompt of each; None: each has its own, numbered from 0.
        other_groups: (M,) likewise.
        bins: of even width.
        seed: of the resampling.

    Returns:
        `ece` and `brier`, each with `mean`, `interval` (95%; None where every resample says the same) and `n`, the prompts.

    Raises:
        ValueError: nothing to judge, lists of different lengths, or numbers out of range.
    """
    one = _checked_predictions(confidences=confidences, outcomes=outcomes)
    other = _checked_predictions(other_confidences=other_confidences, other_outcomes=other_outcomes)
    split, total = len(one[0]), len(one[0]) + len(other[0])
    named = [*(range(split) if groups is None else groups)], [*(range(total - split) if other_groups is None else other_groups)]
    codes = codes_of(named[0] + named[1], total)
    prompts, generator = int(codes.max()) + 1, np.random.default_rng(seed)
    folds = generator.permutation(prompts) % 2
    sides = [_per_prompt(*one, codes[:split], prompts, bins), _per_prompt(*other, codes[split:], prompts, bins)]

    def differences(weights: Floats) -> Floats:
        return np.subtract(*(_errors(weights, folds, *side) for side in sides))

    chances = np.full(prompts, 1 / prompts)
    blocks = [differences(generator.multinomial(prompts, chances, _BLOCK)) for _ in range(RESAMPLES // _BLOCK)]
    resampled, means = np.concatenate(blocks), differences(np.ones((1, prompts)))[0]
    resampled = resampled[~np.isnan(resampled).any(1)]  # a resample may have no prediction of one kind
    return {
        name: {"mean": float(mean), "interval": _percentiles(values), "n": prompts}
        for name, mean, values in zip(("ece", "brier"), means, resampled.T, strict=True)
    }


def winner_confidence(chosen: ArrayLike, rejected: ArrayLike) -> tuple[Floats, Floats]:
    """The probability of the answer that a Bradley-Terry model predicts to win, and whether it was the chosen one.

    Args:
        chosen: (N,) scores of the chosen answers.
        rejected: (N,) scores of the rejected ones.

    Returns:
        (N,) sigmoid(|chosen - rejected|), which lies in [0.5, 1]; (N,) 1 where the prediction was right, 0 where it was wrong,
        0.5 where the scores tie.
    """
    chosen, rejected = columns_of(chosen=chosen, rejected=rejected)
    return 1 / (1 + np.exp(-np.abs(chosen - rejected))), _credit(chosen, rejected)


def preference_calibration(chosen: ArrayLike, rejected: ArrayLike, **options: Any) -> dict[str, Any]:
    """`calibration` of the confidence in the predicted winner of each comparison, with bins on [0.5, 1].

    Its `log_loss` is the exact loss of a reward model, the mean of -log sigmoid(chosen - rejected). Takes (N,) scores, and the
    options of `calibration`.
    """
    result = calibration(*winner_confidence(chosen, rejected), low=0.5, **options)
    return result | {"log_loss": float(np.logaddexp(0, np.subtract(rejected, chosen, dtype=np.float64)).mean())}


class Calibration(evaluate.Metric):
    """Expected calibration error, Brier score, log loss, and the bins of a reliability diagram.

    `predictions` are probabilities of a yes, `references` what came of it, 1 or 0; options as in `calibration`. For
    comparisons, `winner_confidence` makes both out of scores.

        >>> Calibration().compute(predictions=[0.75, 0.75, 0.75, 0.75], references=[1, 1, 1, 0])["ece"]
        0.0
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self, _NUMBER)

    def _compute(self, predictions: list[float], references: list[float], **options: Any) -> dict[str, Any]:
        return calibration(predictions, references, **options)


# --- Score and length ------------------------------------------------------------------------------------


def score_length(scores: ArrayLike, lengths: ArrayLike, *, groups: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """The correlation of score and length (Singhal et al. 2023), over all answers and within prompts.

    Prompts differ in how long an answer they need and in how well they are answered, which makes a correlation of its own; the
    one within prompts is free of it. It correlates deviations from the mean of the prompt (Pearson), or of the ranks among the
    answers to the prompt (Spearman).

    Args:
        scores: (N,) scores of answers.
        lengths: (N,) their lengths, in tokens.
        groups: (N,) the prompt or ranking of each; None: nothing is said of correlations within.

    Returns:
        `pearson`, `spearman`, `n`; `pearson_within`, `spearman_within`, `n_within`: of the answers that are not alone in their
        group. None where the scores or lengths do not vary.

    Raises:
        ValueError: no answers, lists of different lengths, or numbers that are not finite.
    """
    scores, lengths = columns_of(scores=scores, lengths=lengths)
    members = [rows for rows in _members(codes_of(groups, len(scores))) if len(rows) > 1]
    deviations = [np.concatenate([_centred(x[rows]) for rows in members] or [[]]) for x in (scores, lengths)]
    positions = [np.concatenate([_centred(_ranks(x[rows])) for rows in members] or [[]]) for x in (scores, lengths)]
    return {
        "pearson": _pearson(scores, lengths),
        "spearman": _pearson(_ranks(scores), _ranks(lengths)),
        "n": len(scores),
        "pearson_within": _pearson(*deviations),
        "spearman_within": _pearson(*positions),
        "n_within": sum(map(len, members)),
    }


class ScoreLength(evaluate.Metric):
    """Pearson's and Spearman's correlation of score and length, over all answers and within prompts.

    `predictions` are scores, `references` lengths; options as in `score_length`.

        >>> ScoreLength().compute(predictions=[0.0, 1.0, 5.0], references=[10, 20, 30])["spearman"]
        1.0
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self, _NUMBER)

    def _compute(self, predictions: list[float], references: list[float], **options: Any) -> dict[str, Any]:
        return score_length(predictions, references, **options)


# --- Distribution ----------------------------------------------------------------------------------------


def score_distribution(scores: ArrayLike, bins: int = 20) -> dict[str, Any]:
    """The distribution of scores: what a reward is centred and scaled by, and whether a few answers carry its spread.

    Args:
        scores: (N,).
        bins: of the histogram.

    Returns:
        `n`, `mean`, `std` (that of the N scores themselves: the mean of squares by N), `skew` (the third standardised moment;
        None for constant scores, whose `std` is 0), `quantiles`, and `histogram`: `edges` (bins + 1,) and `counts` (bins,).

    Raises:
        ValueError: no scores, or numbers that are not finite.
    """
    (scores,) = columns_of(scores=scores)
    deviations = _centred(scores)
    std = math.sqrt(np.mean(deviations**2))
    quantiles = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    counts, edges = np.histogram(scores, bins)
    return {
        "n": len(scores),
        "mean": float(scores.mean()),
        "std": std,
        "skew": float(np.mean((deviations / std) ** 3)) if std else None,
        "quantiles": dict(zip(map(str, quantiles), np.quantile(scores, quantiles).tolist(), strict=True)),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


# --- A reward model --------------------------------------------------------------------------------------


def evaluate_reward(
    scores: Sequence[Sequence[float]],
    ranks: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[float]],
    *,
    groups: Sequence[Hashable] | None = None,
    margins: Sequence[float] | None = None,
    bins: int = 10,
    binning: Literal["width", "mass"] = "width",
    seed: int = 0,
) -> dict[str, Any]:
    """Everything above about a reward model, on held-out rankings; a pair is a ranking of two.

    Every two answers of different rank are a comparison. A ranking of K answers has up to K(K-1)/2 of them, so long rankings
    weigh more in `accuracy` and `calibration`; in `tau` every ranking weighs the same.

    Args:
        scores: of each ranking, (K,) scores; K may differ.
        ranks: of each ranking, (K,) human ranks, lower being better.
        lengths: of each ranking, (K,) lengths of the answers, in tokens.
        groups: the prompt of each ranking (text or a number); None: each ranking has a prompt of its own.
        margins: for pairs only: how much better people found the chosen answer of each. In their stead the difference of ranks
            is taken, where it varies.
        bins: of the calibration.
        binning: of the calibration.
        seed: of all resampling.

    Returns:
        `accuracy` (`pair_accuracy`), `length_accuracy`: that of preferring the longer answer, to compare with; `tau`
        (`ranking_tau`), `calibration` (`preference_calibration`), `score_length`, `scores` (`score_distribution`).

    Raises:
        ValueError: no rankings, no comparisons, a ranking of less than two answers or with lists of different lengths, margins
            of rankings of more than two, or numbers that are not finite.
    """
    _check_rankings(scores=scores, ranks=ranks, lengths=lengths)
    prompts = codes_of(groups, len(scores)).tolist()
    pairs = list(_comparisons(ranks))
    if not pairs:
        raise ValueError("There is nothing to compare: in every ranking all answers have the same rank.")
    chosen, rejected = ([scores[number][pair[side]] for number, *pair in pairs] for side in (0, 1))
    long, short = ([lengths[number][pair[side]] for number, *pair in pairs] for side in (0, 1))
    of_pairs = {"groups": [prompts[number] for number, *_ in pairs], "seed": seed}
    return {
        "accuracy": pair_accuracy(
            chosen,
            rejected,
            chosen_lengths=long,
            rejected_lengths=short,
            margins=_human_margins(ranks, margins, pairs),
            **of_pairs,
        ),
        "length_accuracy": float(_credit(np.asarray(long), np.asarray(short)).mean()),
        "tau": ranking_tau(scores, ranks, groups=prompts, seed=seed),
        "calibration": preference_calibration(chosen, rejected, bins=bins, binning=binning, **of_pairs),
        "score_length": score_length(
            np.concatenate(scores), np.concatenate(lengths), groups=np.repeat(prompts, [len(row) for row in scores]).tolist()
        ),
        "scores": score_distribution(np.concatenate(scores)),
    }


def _comparisons(ranks: Sequence[Sequence[float]]) -> Iterator[tuple[int, int, int]]:
    """Every two answers of different rank: the number of the ranking, the place of the better answer, that of the worse."""
    for number, row in enumerate(ranks):
        for one, other in itertools.combinations(range(len(row)), 2):
            if row[one] != row[other]:
                yield (number, one, other) if row[one] < row[other] else (number, other, one)


def _human_margins(
    ranks: Sequence[Sequence[float]], margins: Sequence[float] | None, pairs: list[tuple[int, int, int]]
) -> list[float] | None:
    if margins is None:
        gaps = [ranks[number][worse] - ranks[number][better] for number, better, worse in pairs]
        return gaps if len(set(gaps)) > 1 else None
    if len(margins) != len(ranks) or any(len(row) != 2 for row in ranks):
        raise ValueError("`margins` go with pairs: one number each, and no ranking of more than two answers.")
    return [margins[number] for number, *_ in pairs]


# --- What they share -------------------------------------------------------------------------------------


def _check_range(name: str, array: Floats, low: float) -> None:
    bad = np.flatnonzero((array < low) | (array > 1))
    if len(bad):
        raise ValueError(f"`{name}` must be in [{low}, 1], and that at {bad[0]} is {array[bad[0]]}.")


def _checked_predictions(low: float = 0.0, /, **columns: ArrayLike) -> list[Floats]:
    """Confidences in [low, 1], and what came of them in [0, 1], under the names of the arguments."""
    for name, array, least in zip(columns, (checked := columns_of(**columns)), (low, 0.0), strict=True):
        _check_range(name, array, least)
    return checked


def _check_rankings(**columns: Sequence[ArrayLike]) -> None:
    counts = {name: len(rows) for name, rows in columns.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        raise ValueError(f"As many rankings of each are needed, and at least one: {counts}.")
    for number, rows in enumerate(zip(*columns.values(), strict=True)):
        sizes = dict(zip(columns, map(len, rows), strict=True))
        if len(set(sizes.values())) > 1 or min(sizes.values()) < 2:
            raise ValueError(f"Ranking {number} (from 0) must have as many of each, and at least two: {sizes}.")
        for name, row in zip(columns, rows, strict=True):
            check_finite(f"{name}[{number}]", np.asarray(row, dtype=np.float64))


def _credit(chosen: Floats, rejected: Floats) -> Floats:
    """(N,) 1 where the chosen has more, 0.5 where they tie, else 0."""
    return (np.sign(chosen - rejected) + 1) / 2


def _share(values: Floats, codes: Integers, seed: int) -> dict[str, Any]:
    if not len(values):
        return {"n": 0, "accuracy": None, "interval": None}
    return {"n": len(values), "accuracy": float(values.mean()), "interval": share_interval(values, codes, seed)}


def _members(codes: Integers) -> list[Integers]:
    """The rows of each group."""
    return np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])


def _quantiles(values: Floats, parts: int) -> Floats:
    """The inner edges of up to `parts` bins of as many values each: fewer where values are equal."""
    return np.unique(np.quantile(values, np.arange(1, parts) / parts))


def _cut(values: Floats, inner: Floats) -> Integers:
    """(N,) the bin of each value, from 0, given the edges between bins: a value on an edge belongs below it."""
    return np.searchsorted(inner, values, side="left")


def _ece(confidences: Floats, outcomes: Floats, places: Integers) -> float:
    return float(np.abs(np.bincount(places, weights=outcomes - confidences)).sum() / len(places))


def _per_prompt(confidences: Floats, outcomes: Floats, codes: Integers, prompts: int, bins: int) -> tuple[Floats, ...]:
    """Of each prompt's predictions: sums of outcome less confidence by bin (P, bins), of squares (P,), and how many (P,)."""
    places = codes * bins + _cut(confidences, np.linspace(0, 1, bins + 1)[1:-1])
    gaps = np.bincount(places, outcomes - confidences, prompts * bins).reshape(prompts, bins)
    return gaps, np.bincount(codes, _squares(confidences, outcomes), prompts), np.bincount(codes, minlength=prompts)


def _errors(weights: Floats, folds: Integers, gaps: Floats, squares: Floats, counts: Floats) -> Floats:
    """(B, 2) ECE, its signs from the other fold, and Brier score, with weights (B, P) on the prompts; NaN where nothing is."""
    first, second = (weights[:, folds == fold] @ gaps[folds == fold] for fold in (0, 1))
    error = (np.sign(second) * first + np.sign(first) * second).sum(1)
    total = weights @ counts
    sums = np.stack([error, weights @ squares], 1)
    return np.divide(sums, total[:, None], out=np.full_like(sums, np.nan), where=total[:, None] > 0)


def _percentiles(values: Floats) -> list[float] | None:
    """The 95% interval of what was resampled; None where it is all the same."""
    return np.quantile(values, (0.025, 0.975)).tolist() if np.ptp(values) else None


def _squares(confidences: Floats, outcomes: Floats) -> Floats:
    """(N,) the expected square of confidence less outcome, of an outcome in between too."""
    return outcomes * (1 - confidences) ** 2 + (1 - outcomes) * confidences**2


def _ranks(values: Floats) -> Floats:
    """(N,) ranks from 1, equal values sharing the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def _centred(values: Floats) -> Floats:
    """(N,) deviations from the mean: exactly 0 for constants, which plain subtraction may miss by rounding."""
    shifted = values - values[:1]
    return shifted - shifted.mean() if len(values) else shifted


def _pearson(first: Floats, second: Floats) -> float | None:
    first, second = _centred(first), _centred(second)
    norms = math.sqrt((first @ first) * (second @ second))
    return float(np.clip(first @ second / norms, -1, 1)) if norms else None
