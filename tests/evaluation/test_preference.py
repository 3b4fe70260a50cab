"""Metrics of preferences: against hand-computed cases, brute force, values from SciPy 1.17, and simulated worlds."""

import doctest
import itertools
import json
import math
import re
import statistics
from xml.etree import ElementTree

from rlhf_recipes.evaluation.metrics import intervals as resampling
from rlhf_recipes.evaluation.metrics import preference
from rlhf_recipes.evaluation.metrics.intervals import share_interval, wilson_interval
from rlhf_recipes.evaluation.metrics.preference import (
    Calibration,
    PairAccuracy,
    RankingTau,
    ScoreLength,
    calibration,
    calibration_difference,
    evaluate_reward,
    kendall_tau,
    pair_accuracy,
    preference_calibration,
    ranking_tau,
    score_distribution,
    score_length,
    winner_confidence,
)
from rlhf_recipes.evaluation.report import plots
from rlhf_recipes.rewards.matching import KINDS

import evaluate
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _metrics_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


def noisy_rankings(sizes, seed=0):
    """Scores, human ranks and lengths of rankings of these sizes; scores follow quality and length, with noise."""
    generator = np.random.default_rng(seed)
    scores, ranks, lengths = [], [], []
    for size in sizes:
        quality = generator.normal(size=size)
        length = generator.integers(5, 100, size)
        scores.append((quality + 0.02 * length + generator.normal(size=size)).tolist())
        ranks.append(np.argsort(np.argsort(-quality)).astype(float).tolist())
        lengths.append(length.tolist())
    return scores, ranks, lengths


# --- Accuracy --------------------------------------------------------------------------------------------


def test_accuracy_counts_a_tie_as_half():
    result = pair_accuracy([2, 1, 0, 5], [1, 1, 3, 2])
    assert (result["accuracy"], result["n"], result["groups"], result["ties"]) == (2.5 / 4, 4, 4, 1)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),  # scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
    [
        (1, 1, 0.20654931437723745, 1.0),
        (7, 10, 0.39677814746114526, 0.892208732593699),
        (45, 50, 0.7863976856252034, 0.9565242350681095),
        (50, 50, 0.9286524008666412, 1.0),
        (0, 4, 0.0, 0.4898908364545973),
    ],
)
def test_interval_of_independent_comparisons_is_wilsons(right, n, low, high):
    assert wilson_interval(right / n, n) == pytest.approx([low, high], abs=1e-12)
    outcomes = np.arange(n) < right
    for groups in (None, [f"prompt {number}" for number in range(n)]):
        assert pair_accuracy(outcomes, ~outcomes, groups=groups)["interval"] == pytest.approx([low, high], abs=1e-12)


def test_margins_are_cut_into_quartiles_and_equal_ones_stay_together():
    signs = np.array([-1, 1, -1, 1, 1, 1, 1, 1])
    margins = np.array([1, 2, 3, 4, 5, 6, 7, 8]) * signs
    slices = pair_accuracy(margins, np.zeros(8))["by_predicted_margin"]
    assert [(s["low"], s["high"], s["n"], s["accuracy"]) for s in slices] == [
        (1, 2, 2, 0.5),
        (3, 4, 2, 0.5),
        (5, 6, 2, 1.0),
        (7, 8, 2, 1.0),
    ]
    slices = pair_accuracy(margins, np.zeros(8), margins=[1, 1, 1, 1, 1, 2, 2, 3])["by_human_margin"]
    assert [(s["low"], s["high"], s["n"], s["accuracy"]) for s in slices] == [(1, 1, 5, 0.6), (2, 2, 2, 1.0), (3, 3, 1, 1.0)]
    assert [s["n"] for s in pair_accuracy([0, 0, 0, 1], [0, 0, 0, 0])["by_predicted_margin"]] == [3, 1]


def test_accuracy_by_which_answer_is_longer():
    result = pair_accuracy([1, 1, 0, 1], [0, 0, 1, 0], chosen_lengths=[9, 9, 9, 1], rejected_lengths=[3, 3, 3, 3])["by_length"]
    assert {name: (part["n"], part["accuracy"]) for name, part in result.items()} == {
        "chosen_longer": (3, 2 / 3),
        "chosen_shorter": (1, 1.0),
        "same_length": (0, None),
    }
    assert result["same_length"]["interval"] is None
    with pytest.raises(ValueError, match="rejected_lengths"):
        pair_accuracy([1], [0], chosen_lengths=[3])


def test_bootstrap_draws_whole_groups():
    """Of two groups, a quarter of the draws has the first twice, a quarter the second: shares of 1 and of 0."""
    assert share_interval(np.array([1.0, 1, 1, 0]), np.array([0, 0, 0, 1])) == [0.0, 1.0]


def test_bootstrap_agrees_with_the_normal_approximation_in_large_samples():
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 7, 2000)
    codes = np.repeat(np.arange(2000), sizes)
    values = (generator.random(len(codes)) < np.repeat(generator.random(2000) * sizes / 6, sizes)).astype(float)
    mean = values.mean()
    residuals = [(values[codes == code] - mean).sum() for code in range(2000)]
    half = 1.96 * math.sqrt(sum(r * r for r in residuals)) / len(values)
    assert share_interval(values, codes) == pytest.approx([mean - half, mean + half], abs=0.003)


@pytest.mark.parametrize(("right", "expected"), [([1, 1, 1, 1], 1.0), ([0, 1, 1, 0], 0.5)])
def test_groups_that_do_not_differ_count_as_one_observation_each(right, expected):
    groups = ["a", "a", "b", "b"]
    assert pair_accuracy(right, np.subtract(1, right), groups=groups)["interval"] == wilson_interval(expected, 2)
    assert pair_accuracy(right, np.subtract(1, right), groups=["a"] * 4)["interval"] == wilson_interval(expected, 1)


def test_intervals_hold_the_truth_95_times_in_100(monkeypatch):
    """300 studies of 60 rankings of 9 answers: comparisons taken as independent would be far too sure of themselves."""
    monkeypatch.setattr(resampling, "RESAMPLES", 300)
    generator = np.random.default_rng(0)
    one, other = np.triu_indices(9, 1)

    def study(rankings):
        quality = generator.normal(size=(rankings, 9))
        scores = quality * np.exp(0.7 * generator.normal(size=(rankings, 1))) + generator.normal(size=(rankings, 9))
        agree = (quality[:, one] - quality[:, other]) * (scores[:, one] - scores[:, other]) > 0
        return agree.astype(float)

    truth = study(20_000).mean()
    codes = np.repeat(np.arange(60), len(one))
    grouped, independent = [], []
    for _ in range(300):
        right = study(60).ravel()
        for held, (low, high) in (
            (grouped, share_interval(right, codes)),
            (independent, wilson_interval(right.mean(), right.size)),
        ):
            held.append(low <= truth <= high)
    assert 0.91 < np.mean(grouped) < 0.98
    assert np.mean(independent) < 0.75
    intervals = [wilson_interval(right / 60, 60) for right in generator.binomial(60, 0.8, 3000)]
    assert 0.94 < np.mean([low <= 0.8 <= high for low, high in intervals]) < 0.97


# --- Rankings --------------------------------------------------------------------------------------------


def brute_tau(first, second):
    """Tau-b, counted pair by pair."""
    concordant = discordant = first_untied = second_untied = 0
    for i in range(len(first)):
        for j in range(i):
            product = (first[i] - first[j]) * (second[i] - second[j])
            concordant += product > 0
            discordant += product < 0
            first_untied += first[i] != first[j]
            second_untied += second[i] != second[j]
    if not first_untied * second_untied:
        return None
    return (concordant - discordant) / (first_untied * second_untied) ** 0.5


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 3], [1, 3, 2], 1 / 3),
        ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(6)),
        ([1, 1], [1, 2], None),
        ([1, 2, 3, 4, 5], [3, 1, 4, 2, 5], 0.4),  # scipy.stats.kendalltau from here
        ([1, 1, 2, 3], [1, 2, 2, 4], 0.8),
        ([0.3, 0.3, -1, 2, 2, 5], [6, 5, 5, 2, 1, 1], -0.6923076923076924),
    ],
)
def test_kendalls_tau(first, second, tau):
    assert kendall_tau(first, second) == pytest.approx(tau)


def test_kendalls_tau_with_ties_equals_counting_pair_by_pair():
    generator = np.random.default_rng(1)
    for size in generator.integers(2, 10, 300):
        first, second = generator.integers(0, 4, (2, size)).tolist()
        assert kendall_tau(first, second) == pytest.approx(brute_tau(first, second))


def test_tau_is_the_mean_over_rankings_and_low_ranks_are_good():
    result = ranking_tau([[3, 2, 1], [0, 1], [5, 5], [1, 2]], [[1, 2, 3], [1, 2], [1, 2], [1, 1]])
    assert result["tau"] == pytest.approx((1 - 1 + 0) / 3)
    assert (result["rankings"], result["tied_scores"], result["tied_ranks"]) == (3, 1, 1)
    assert result["interval"][0] < 0 < result["interval"][1]


def test_interval_of_tau_is_of_whole_prompts():
    scores, ranks, _ = noisy_rankings([4] * 100)
    once = ranking_tau(scores, ranks)
    doubled = ranking_tau(scores * 2, ranks * 2, groups=list(range(100)) * 2)
    assert doubled["tau"] == pytest.approx(once["tau"])
    assert doubled["interval"] == pytest.approx(once["interval"])
    narrower = ranking_tau(scores * 2, ranks * 2)["interval"]
    assert np.ptp(narrower) == pytest.approx(np.ptp(once["interval"]) / math.sqrt(2), rel=0.1)
    taus = [kendall_tau(s, np.negative(r)) for s, r in zip(scores, ranks, strict=True)]
    half = 1.96 * statistics.stdev(taus) / 10
    assert once["interval"] == pytest.approx([once["tau"] - half, once["tau"] + half], abs=0.02)


@pytest.mark.parametrize("ranks", [[[1, 2]], [[1, 2], [1, 2]]])
def test_tau_without_variation_has_no_interval(ranks):
    result = ranking_tau([[1, 0]] * len(ranks), ranks)
    assert (result["tau"], result["interval"]) == (1.0, None)


def test_tau_of_nothing_but_ties_is_undefined():
    assert ranking_tau([[1, 0]], [[1, 1]]) == {
        "tau": None,
        "interval": None,
        "rankings": 0,
        "tied_scores": 0,
        "tied_ranks": 1,
    }


# --- Calibration -----------------------------------------------------------------------------------------


def test_calibration_by_hand():
    result = calibration([0.1, 0.2, 0.9, 0.8, 0.7], [0, 1, 1, 1, 0], bins=2)
    low, high = result["bins"]
    assert (low["low"], low["high"], low["n"], high["n"]) == (0, 0.5, 2, 3)
    assert (low["confidence"], low["accuracy"], high["confidence"]) == pytest.approx((0.15, 0.5, 0.8))
    assert high["interval"] == pytest.approx(wilson_interval(2 / 3, 3))
    assert result["ece"] == pytest.approx(2 / 5 * 0.35 + 3 / 5 * (0.8 - 2 / 3))
    assert result["brier"] == pytest.approx((0.01 + 0.64 + 0.01 + 0.04 + 0.49) / 5)
    assert result["log_loss"] == pytest.approx(-sum(map(math.log, (0.9, 0.2, 0.9, 0.8, 0.3))) / 5)
    assert (result["accuracy"], result["confidence"], result["n"]) == pytest.approx((0.6, 0.54, 5))


def test_bins_of_equal_width_hold_their_upper_edge_and_the_lowest_value():
    confidences = [0.0, 0.25, 0.26, 0.5, 1.0]
    assert [entry["n"] for entry in calibration(confidences, [0] * 5, bins=4)["bins"]] == [2, 2, 1]


def test_bins_of_equal_mass():
    generator = np.random.default_rng(0)
    bins = calibration(confidences := generator.random(1000) ** 3, [0] * 1000, bins=8, binning="mass")["bins"]
    assert [entry["n"] for entry in bins] == [125] * 8
    assert (bins[0]["low"], bins[-1]["high"]) == (confidences.min(), confidences.max())
    bins = calibration([0.2] * 6 + [0.4], [0] * 7, bins=5, binning="mass")["bins"]
    assert [(entry["n"], entry["confidence"]) for entry in bins] == [(6, pytest.approx(0.2)), (1, 0.4)]


def test_perfect_predictions_have_no_error():
    """In groups of 10 predictions of k/10, exactly k come true."""
    confidences = np.repeat(np.arange(1, 10) / 10, 10)
    outcomes = np.concatenate([np.arange(10) < k for k in range(1, 10)])
    for binning in ("width", "mass"):
        assert calibration(confidences, outcomes, binning=binning)["ece"] == pytest.approx(0, abs=1e-12)
    assert calibration(confidences, 1 - outcomes)["ece"] == pytest.approx(np.mean(np.abs(1 - 2 * confidences)))


def test_error_that_chance_alone_makes():
    """It is what calibrated predictions show on average, shrinks as 1/√N, and overconfidence stands out from it."""
    generator = np.random.default_rng(2)
    confidences = generator.random(400)
    results = [calibration(confidences, generator.random(400) < confidences) for _ in range(100)]
    assert statistics.mean(r["ece"] for r in results) == pytest.approx(results[0]["ece_if_calibrated"], rel=0.05)
    larger = calibration(np.tile(confidences, 16), np.zeros(6400))["ece_if_calibrated"]
    assert larger == pytest.approx(results[0]["ece_if_calibrated"] / 4, rel=0.1)
    overconfident = calibration(confidences, generator.random(400) < 0.5 + (confidences - 0.5) / 2)
    assert overconfident["ece"] > 2 * overconfident["ece_if_calibrated"]


def test_certain_and_wrong_is_finite():
    assert calibration([1.0, 0.0], [0, 1])["log_loss"] == pytest.approx(-math.log(1e-15), rel=0.01)
    assert calibration([1.0, 0.0], [1, 0])["log_loss"] == pytest.approx(0, abs=1e-14)


def test_half_an_outcome_is_half_a_yes_and_half_a_no():
    half, both = calibration([0.7, 0.7], [0.5, 0.5]), calibration([0.7, 0.7], [0, 1])
    for key in ("ece", "brier", "log_loss", "accuracy"):
        assert half[key] == pytest.approx(both[key])


def test_confidence_in_the_predicted_winner():
    confidences, right = winner_confidence([2, 0, 1, 1000], [0, 2, 1, -1000])
    sure = 1 / (1 + math.exp(-2))
    assert confidences == pytest.approx([sure, sure, 0.5, 1.0])
    assert right.tolist() == [1, 0, 0.5, 1]


def test_a_true_bradley_terry_model_is_calibrated_and_a_scaled_one_is_not():
    generator = np.random.default_rng(4)
    margins = generator.normal(scale=2, size=20_000)
    wins = generator.random(20_000) < 1 / (1 + np.exp(-margins))
    chosen = np.where(wins, margins, -margins)
    zeros = np.zeros(20_000)
    true, scaled = preference_calibration(chosen, zeros), preference_calibration(3 * chosen, zeros)
    assert true["ece"] < 0.015
    assert scaled["ece"] > 0.1
    assert true["log_loss"] < scaled["log_loss"]
    assert [entry["low"] for entry in true["bins"]] == pytest.approx(np.arange(0.5, 1, 0.05))
    assert true["accuracy"] == pair_accuracy(chosen, zeros)["accuracy"]
    naive = calibration(1 / (1 + np.exp(-chosen)), np.ones(20_000))
    assert naive["ece"] > 0.2, "comparisons all in one order look badly calibrated: the trap that the docstring names"


def test_log_loss_is_that_of_the_reward_model():
    chosen, rejected = [0.3, -2.0, 900.0], [1.0, -2.0, 0.0]
    expected = statistics.mean(math.log1p(math.exp(r - c)) for c, r in zip(chosen, rejected, strict=True))
    assert preference_calibration(chosen, rejected)["log_loss"] == pytest.approx(expected)
    assert preference_calibration([0.0], [900.0])["log_loss"] == 900


def test_intervals_of_bins_are_of_whole_groups():
    generator = np.random.default_rng(0)
    outcomes = np.repeat(generator.random(30) < 0.7, 5)
    alone, grouped = (
        calibration([0.7] * 150, outcomes, groups=groups)["bins"][0]["interval"] for groups in (None, np.repeat(range(30), 5))
    )
    assert np.ptp(grouped) > 1.8 * np.ptp(alone)


def test_what_chance_gives_where_predictions_share_an_outcome():
    confidences = np.random.default_rng(0).random(60)
    outcomes = (np.random.default_rng(1).random(60) < confidences).astype(float)
    once = calibration(confidences, outcomes)["ece_if_calibrated"]
    four = np.repeat(confidences, 4), np.repeat(outcomes, 4)
    together = calibration(*four, events=np.repeat(np.arange(60), 4).tolist())["ece_if_calibrated"]
    assert together == pytest.approx(once)  # four copies of each say nothing new
    assert calibration(*four)["ece_if_calibrated"] < 0.7 * once
    with pytest.raises(ValueError, match="`events` has 1 entries for 60"):
        calibration(confidences, outcomes, events=[0])


def predictions(generator, groups, gap):
    """Confidences that lie `gap` above the frequencies."""
    confidences = gap + (1 - gap) * generator.random(len(groups))
    return confidences, (generator.random(len(groups)) < confidences - gap).astype(float)


def test_the_difference_of_calibration_by_hand():
    """Gaps that every prompt has alike: of -.2 in one bin, and of .5 in another."""
    found = calibration_difference([0.7] * 20, [0.5] * 20, [0.5] * 20, [1.0] * 20)
    assert found["ece"] == {"mean": pytest.approx(0.2 - 0.5), "interval": pytest.approx([-0.3, -0.3]), "n": 20}
    assert found["brier"]["mean"] == pytest.approx((0.5 * 0.3**2 + 0.5 * 0.7**2) - 0.5**2)


def test_the_difference_of_calibration_is_that_of_the_two():
    generator = np.random.default_rng(0)
    groups, others = np.repeat(np.arange(400), 3), np.arange(400)
    one, other = predictions(generator, groups, 0.4), predictions(generator, others, 0.1)
    found = calibration_difference(*one, *other, groups=groups.tolist(), other_groups=others.tolist())
    plain = [calibration(*one), calibration(*other)]
    assert found["brier"]["mean"] == pytest.approx(plain[0]["brier"] - plain[1]["brier"])
    assert found["ece"]["mean"] == pytest.approx(plain[0]["ece"] - plain[1]["ece"], abs=0.05)
    for name in ("ece", "brier"):
        low, high = found[name]["interval"]
        assert 0 < low < found[name]["mean"] < high
        assert found[name]["n"] == 400
    # the same answers five times over say nothing new
    repeated = [np.repeat(column, 5) for column in (*one, *other)]
    again = calibration_difference(*repeated, groups=np.repeat(groups, 5).tolist(), other_groups=np.repeat(others, 5).tolist())
    assert again["ece"]["interval"] == pytest.approx(found["ece"]["interval"])
    assert calibration_difference(*one, *one, groups=groups.tolist(), other_groups=groups.tolist())["ece"] == {
        "mean": 0,
        "interval": None,
        "n": 400,
    }


@pytest.mark.parametrize(("gaps", "truth"), [((0.0, 0.0), 0.0), ((0.3, 0.0), 0.3)])
def test_the_interval_of_a_difference_of_calibration_holds_the_truth(gaps, truth):
    """Also where one of the two says little, whose error is large by chance alone."""
    hits, surely, runs = 0, 0, 60
    for run in range(runs):
        generator = np.random.default_rng(run)
        groups, others = np.repeat(np.arange(150), 2), generator.permutation(150)[:40]
        one, other = predictions(generator, groups, gaps[0]), predictions(generator, others, gaps[1])
        low, high = calibration_difference(*one, *other, groups=groups.tolist(), other_groups=others.tolist(), seed=run)["ece"][
            "interval"
        ]
        hits += low <= truth <= high
        surely += calibration(*one)["ece"] + 0.02 < calibration(*other)["ece"]
    assert hits / runs >= 0.9
    assert (surely / runs > 0.9) == (truth == 0)  # what the plain difference says


def test_the_difference_of_calibration_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match=r"`other_confidences` must be in \[0.0, 1\]"):
        calibration_difference([0.5], [1], [1.5], [1])
    with pytest.raises(ValueError, match="`groups` has 3 entries for 2"):
        calibration_difference([0.5], [1], [0.5], [1], groups=[0, 1])


# --- Length and distribution -----------------------------------------------------------------------------

SCORES, LENGTHS = [0.5, 1.5, 1.5, -2, 3, 0.7, 0.1], [12, 30, 25, 25, 80, 25, 3]


def test_correlations_equal_those_of_scipy():
    result = score_length(SCORES, LENGTHS)
    assert result["pearson"] == pytest.approx(0.6386963216614707)
    assert result["spearman"] == pytest.approx(0.7479575920067658)
    assert (result["n"], result["n_within"], result["pearson_within"]) == (7, 0, None)


def test_correlation_within_prompts_is_free_of_differences_between_them():
    """Between prompts longer is better; within each, longer is worse."""
    scores = [1, 2, 3, 11, 12, 13, 21, 22, 23, 99]
    lengths = [13, 12, 11, 23, 22, 21, 33, 32, 31, 5]
    groups = [*"aaabbbccc", "alone"]
    result = score_length(scores[:-1], lengths[:-1], groups=groups[:-1])
    assert result["pearson"] > 0.9
    assert (result["pearson_within"], result["spearman_within"]) == pytest.approx((-1, -1))
    with_one_alone = score_length(scores, lengths, groups=groups)
    assert (with_one_alone["pearson_within"], with_one_alone["n_within"]) == (pytest.approx(-1), 9)


def test_correlation_within_by_hand():
    groups = [0, 0, 1, 1, 1]
    result = score_length([1, 3, 0, 3, 6], [1, 2, 5, 8, 2], groups=groups)
    x, y = [-1, 1, -3, 0, 3], [-0.5, 0.5, 0, 3, -3]
    assert result["pearson_within"] == pytest.approx((0.5 + 0.5 - 9) / math.sqrt(20 * 18.5))
    assert np.corrcoef(x, y)[0, 1] == pytest.approx(result["pearson_within"])
    x, y = [-0.5, 0.5, -1, 0, 1], [-0.5, 0.5, 0, 1, -1]
    assert result["spearman_within"] == pytest.approx(np.corrcoef(x, y)[0, 1])


@pytest.mark.parametrize("constant", [0.1, 1e9, -7])
def test_correlation_with_a_constant_is_undefined(constant):
    result = score_length([constant] * 6, [1, 2, 3, 4, 5, 6], groups=[0, 0, 0, 1, 1, 1])
    assert [result[key] for key in ("pearson", "spearman", "pearson_within", "spearman_within")] == [None] * 4


def test_correlation_within_prompts_of_constant_scores_is_undefined():
    """Though the scores differ between prompts, and 0.1 three times does not average to 0.1 in floating point."""
    result = score_length([0.1, 0.1, 0.1, 0.7, 0.7, 0.7], [1, 2, 4, 3, 5, 9], groups=[0, 0, 0, 1, 1, 1])
    assert (result["pearson_within"], result["spearman_within"]) == (None, None)
    assert result["pearson"] > 0


def test_distribution():
    result = score_distribution(SCORES, bins=5)
    assert result["mean"] == pytest.approx(statistics.mean(SCORES))
    assert result["std"] == pytest.approx(statistics.pstdev(SCORES))
    assert result["skew"] == pytest.approx(-0.45103833916917163)  # scipy.stats.skew
    assert result["quantiles"]["0.0"] == -2
    assert result["quantiles"]["0.5"] == 0.7
    assert result["quantiles"]["1.0"] == 3
    assert result["histogram"]["edges"] == pytest.approx([-2, -1, 0, 1, 2, 3])
    assert result["histogram"]["counts"] == [1, 0, 3, 2, 1]
    scaled = (np.array(SCORES) - result["mean"]) / result["std"]
    assert (scaled.mean(), scaled.std()) == pytest.approx((0, 1))


def test_distribution_of_a_constant():
    result = score_distribution([0.1] * 3)
    assert (result["mean"], result["std"], result["skew"]) == (pytest.approx(0.1), 0, None)
    assert sum(result["histogram"]["counts"]) == 3


# --- All together ----------------------------------------------------------------------------------------


def test_evaluate_reward_equals_its_parts():
    scores, ranks, lengths = noisy_rankings([2, 9, 4, 2, 5])
    ranks[2] = [0, 0, 1, 2]
    groups = ["a", "b", "c", "a", "d"]
    right, prefers_long, of = [], [], []
    for s, r, size, group in zip(scores, ranks, lengths, groups, strict=True):
        for i, j in itertools.permutations(range(len(s)), 2):
            if r[i] < r[j]:
                right.append(s[i] > s[j])
                prefers_long.append((size[i] > size[j]) + (size[i] == size[j]) / 2)
                of.append(group)
    result = evaluate_reward(scores, ranks, lengths, groups=groups, seed=3)
    assert result["accuracy"]["n"] == len(right) == 1 + 36 + 5 + 1 + 10
    assert result["accuracy"]["groups"] == 4
    assert result["accuracy"]["accuracy"] == pytest.approx(np.mean(right))
    assert result["length_accuracy"] == pytest.approx(np.mean(prefers_long))
    assert sum(part["n"] for part in result["accuracy"]["by_length"].values()) == len(right)
    longer = result["accuracy"]["by_length"]["chosen_longer"]["n"] + result["accuracy"]["by_length"]["same_length"]["n"] / 2
    assert longer == pytest.approx(sum(prefers_long))
    assert result["accuracy"]["by_human_margin"][0]["low"] == 1
    assert result["tau"] == ranking_tau(scores, ranks, groups=groups, seed=3)
    assert result["calibration"]["accuracy"] == result["accuracy"]["accuracy"]
    bins = evaluate_reward(scores, ranks, lengths, bins=4, binning="mass")["calibration"]["bins"]
    assert [entry["n"] for entry in bins] == pytest.approx([len(right) / 4] * 4, abs=1)
    every = [group for group, row in zip(groups, scores, strict=True) for _ in row]
    flat_scores, flat_lengths = (list(itertools.chain(*rows)) for rows in (scores, lengths))
    assert result["score_length"] == score_length(flat_scores, flat_lengths, groups=every)
    assert result["scores"] == score_distribution(flat_scores)


def test_evaluate_reward_is_json_and_follows_from_the_seed():
    inputs = noisy_rankings([2, 9, 4, 3] * 5)
    first, again, other = (evaluate_reward(*inputs, seed=seed) for seed in (1, 1, 2))
    assert json.loads(json.dumps(first, allow_nan=False)) == first == again != other
    assert other["accuracy"]["accuracy"] == first["accuracy"]["accuracy"]
    assert other["accuracy"]["interval"] != first["accuracy"]["interval"]
    assert other["tau"]["interval"] != first["tau"]["interval"]


def test_pairs_are_rankings_of_two():
    scores, ranks, lengths = noisy_rankings([2] * 40, seed=1)
    result = evaluate_reward(scores, ranks, lengths)
    accuracy = result["accuracy"]
    assert result["tau"]["tau"] == pytest.approx(2 * accuracy["accuracy"] - 1)
    assert accuracy["interval"] == wilson_interval(accuracy["accuracy"], 40)
    assert "by_human_margin" not in accuracy, "every difference of ranks is 1"
    margins = np.arange(40.0)
    accuracy = evaluate_reward(scores, ranks, lengths, margins=margins)["accuracy"]
    right = [(s[0] > s[1]) == (r[0] < r[1]) for s, r in zip(scores, ranks, strict=True)]
    assert [(s["low"], s["high"], s["accuracy"]) for s in accuracy["by_human_margin"]] == [
        (low, low + 9, pytest.approx(np.mean(right[low : low + 10]))) for low in (0, 10, 20, 30)
    ]


@pytest.mark.parametrize(
    ("scores", "accuracy"), [([[1.0, 0.0]], 1.0), ([[0.0, 0.0]], 0.5), ([[0.1] * 2, [0.1] * 9], 0.5), ([[0.0, 5.0]], 0.0)]
)
def test_small_and_tied_inputs_have_results(scores, accuracy):
    ranks = [list(range(len(row))) for row in scores]
    lengths = [[7] * len(row) for row in scores]
    result = json.loads(json.dumps(evaluate_reward(scores, ranks, lengths), allow_nan=False))
    assert result["accuracy"]["accuracy"] == accuracy
    assert result["score_length"]["pearson"] is None
    assert result["tau"]["tau"] == 2 * accuracy - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pair_accuracy([], []), "`chosen` is empty"),
        (lambda: pair_accuracy([1, 2], [1]), r"one length .*\(2,\).*\(1,\)"),
        (lambda: pair_accuracy([[1.0]], [[2.0]]), "one length"),
        (lambda: pair_accuracy([1, math.nan], [1, 2]), r"`chosen` has 1 .* not finite, the first \(nan\) at 1"),
        (lambda: pair_accuracy([1, 2], [1, 2], groups=[1]), "`groups` has 1 entries for 2"),
        (lambda: ranking_tau([], []), "at least one"),
        (lambda: ranking_tau([[1, 2]], [[1, 2], [1, 2]]), "As many rankings"),
        (lambda: ranking_tau([[1, 2], [1, 2, 3]], [[1, 2], [1, 2]]), "Ranking 1"),
        (lambda: calibration([], []), "empty"),
        (lambda: calibration([1.2], [1]), r"`confidences` must be in \[0.0, 1\], and that at 0 is 1.2"),
        (lambda: calibration([0.4], [1], low=0.5), r"in \[0.5, 1\]"),
        (lambda: calibration([0.5], [2]), "`outcomes`"),
        (lambda: calibration([0.5], [1], bins=0), "`bins` must be positive"),
        (lambda: calibration([0.5], [1], binning="equal"), "'width' or 'mass'"),
        (lambda: score_length([], []), "empty"),
        (lambda: score_distribution([math.inf]), "not finite"),
        (lambda: evaluate_reward([], [], []), "at least one"),
        (lambda: evaluate_reward([[1]], [[1]], [[1]]), "Ranking 0 .* at least two"),
        (lambda: evaluate_reward([[1, math.nan]], [[1, 2]], [[1, 1]]), r"`scores\[0\]` has 1 numbers"),
        (lambda: evaluate_reward([[1, 2]], [[1, 1]], [[1, 1]]), "nothing to compare"),
        (lambda: evaluate_reward([[1, 2, 3]], [[1, 2, 3]], [[1, 1, 1]], margins=[1]), "`margins` go with pairs"),
        (lambda: evaluate_reward([[1, 2]], [[1, 2]], [[1, 1]], margins=[1, 2]), "`margins` go with pairs"),
        (lambda: plots.reliability_diagram([], "none"), "at least one bin"),
        (lambda: plots.shares_of_kinds({}), "at least one group"),
    ],
)
def test_inputs_without_a_result_say_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- As metrics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "function", "predictions", "references", "options"),
    [
        (PairAccuracy, pair_accuracy, [2.0, 0.5, 1.0], [1.0, 0.5, 3.0], {"groups": ["a", "a", "b"], "seed": 5}),
        (RankingTau, ranking_tau, [[1.0, 2.0], [3.0, 1.0, 2.0]], [[2, 1], [1, 2, 2]], {"seed": 5}),
        (Calibration, calibration, [0.1, 0.6, 0.9], [0, 1, 1], {"bins": 3, "binning": "mass"}),
        (Calibration, calibration, [0.1, 0.6, 0.9], [False, True, True], {}),
        (ScoreLength, score_length, SCORES, LENGTHS, {"groups": [1, 1, 1, 2, 2, 2, 2]}),
    ],
)
def test_metrics_give_what_the_functions_give(metric, function, predictions, references, options):
    expected = function(predictions, references, **options)
    assert metric().compute(predictions=predictions, references=references, **options) == expected
    batched = metric()
    for prediction, reference in zip(predictions, references, strict=True):
        batched.add(prediction=prediction, reference=reference)
    assert batched.compute(**options) == expected
    assert metric().info.description == metric.__doc__


def test_examples_in_docstrings():
    assert doctest.testmod(preference) == (0, 4)


# --- Pictures --------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def pictures():
    result = evaluate_reward(*noisy_rankings([4] * 30))
    bins = result["calibration"]["bins"]
    return (
        bins,
        plots.reliability_diagram(bins, "a < b & c"),
        result["scores"],
        plots.score_histogram(result["scores"], "a < b & c"),
    )


def test_pictures_are_svg_that_stands_alone():
    assert pictures() == pictures()
    for picture in pictures()[1::2]:
        root = ElementTree.fromstring(picture)
        assert "a < b & c" in [text.text for text in root.iter(f"{SVG}text")]
        links = re.findall(r'(?:href="|url\()([^")]*)', picture)
        assert all(link.startswith("#") for link in links)
        assert not re.search(r"<script|<image|\bnan\b|\binf\b", picture)
        coloured = set(re.findall(r"(?:stroke|fill): (#[0-9a-f]{6})", picture)) - {"#ffffff"}
        assert coloured <= {plots.GREY, plots.BLUE, plots.ORANGE}


def test_colours_stand_out_on_white_and_on_black():
    """By WCAG's contrast of at least 3, that of graphics and large print."""
    for colour in (plots.GREY, plots.BLUE, plots.ORANGE, plots.GREEN, plots.RED):
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert min(1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05) >= 3


def test_reliability_diagram_shows_every_bin_where_it_is():
    bins, picture, *_ = pictures()
    root = ElementTree.fromstring(picture)
    marks = [use for group in root.iter(f"{SVG}g") if group.get("id") == "bins" for use in group.iter(f"{SVG}use")]
    places = [(float(mark.get("x")), float(mark.get("y"))) for mark in marks]
    assert len(places) == len(bins)
    # positions are linear in the numbers, and better is up
    for numbers, sign, of in ((0, 1, "confidence"), (1, -1, "accuracy")):
        slope = np.polyfit([entry[of] for entry in bins], [place[numbers] for place in places], 1)
        assert slope[0] * sign > 0
        assert [place[numbers] for place in places] == pytest.approx(np.polyval(slope, [e[of] for e in bins]), abs=0.01)


def test_bars_of_kinds_have_the_lengths_of_their_means_and_a_dot_for_each_seed():
    shares = {"a": {"made_up": [0.2, 0.4], "abstained": [0.1, 0.3], "right": [0.7, 0.3]}}
    shares["b"] = {kind: [0.5, 0.5] for kind in KINDS}
    root = ElementTree.fromstring(plots.shares_of_kinds({"known": shares, "not known": shares}))
    assert {"known", "not known", "a", "b"} <= {text.text for text in root.iter(f"{SVG}text")}
    dots = [group for group in root.iter(f"{SVG}g") if (group.get("id") or "").startswith("seeds")]
    assert [len(list(group.iter(f"{SVG}use"))) for group in dots] == [2] * 4
    first, second = (float(use.get("x")) for use in dots[0].iter(f"{SVG}use"))
    widths = {}
    for path in root.iter(f"{SVG}path"):
        if colour := re.search(r"fill: (#[0-9a-f]{6}); opacity", path.get("style") or ""):
            across = [float(x) for x in re.findall(r"[ML] ([\d.]+)", path.get("d"))]
            widths.setdefault(colour[1], []).append(max(across) - min(across))
    # 0.2 of the axis lie between the two dots
    unit = (second - first) / 0.2
    for colour, share in ((plots.RED, 0.3), (plots.GREY, 0.2), (plots.GREEN, 0.5)):
        assert widths[colour][0] / unit == pytest.approx(share, abs=0.01)


def test_pictures_of_edge_cases_are_drawn():
    for bins in (calibration([0.25], [1])["bins"], calibration([1.0, 1.0], [1, 1], low=0.5)["bins"]):
        ElementTree.fromstring(plots.reliability_diagram(bins, "one bin"))
    ElementTree.fromstring(plots.score_histogram(score_distribution([0.1] * 3), "constant"))
