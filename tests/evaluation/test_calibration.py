"""Calibration against hand-computed cases and simulation."""

import math
import statistics

from rlhf_recipes.evaluation.metrics.calibration import (
    calibration,
    calibration_difference,
    preference_calibration,
    winner_confidence,
)
from rlhf_recipes.evaluation.metrics.intervals import wilson_interval
from rlhf_recipes.evaluation.metrics.scores import pair_accuracy

import numpy as np
import pytest


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


def test_bins_of_equal_width_include_their_upper_edge():
    confidences = [0.0, 0.25, 0.26, 0.5, 1.0]
    assert [entry["n"] for entry in calibration(confidences, [0] * 5, bins=4)["bins"]] == [2, 2, 1]


def test_perfect_predictions_have_no_error():
    """In groups of 10 predictions of k/10, exactly k come true."""
    confidences = np.repeat(np.arange(1, 10) / 10, 10)
    outcomes = np.concatenate([np.arange(10) < k for k in range(1, 10)])
    assert calibration(confidences, outcomes)["ece"] == pytest.approx(0, abs=1e-12)
    assert calibration(confidences, 1 - outcomes)["ece"] == pytest.approx(np.mean(np.abs(1 - 2 * confidences)))


def test_calibration_error_by_chance():
    """It is what calibrated predictions show on average, shrinks as 1/√N, and overconfidence stands out from it."""
    generator = np.random.default_rng(2)
    confidences = generator.random(400)
    results = [calibration(confidences, generator.random(400) < confidences) for _ in range(100)]
    assert statistics.mean(r["ece"] for r in results) == pytest.approx(results[0]["ece_if_calibrated"], rel=0.05)
    larger = calibration(np.tile(confidences, 16), np.zeros(6400))["ece_if_calibrated"]
    assert larger == pytest.approx(results[0]["ece_if_calibrated"] / 4, rel=0.1)
    overconfident = calibration(confidences, generator.random(400) < 0.5 + (confidences - 0.5) / 2)
    assert overconfident["ece"] > 2 * overconfident["ece_if_calibrated"]


def test_log_loss_of_certain_errors_is_finite():
    assert calibration([1.0, 0.0], [0, 1])["log_loss"] == pytest.approx(-math.log(1e-15), rel=0.01)
    assert calibration([1.0, 0.0], [1, 0])["log_loss"] == pytest.approx(0, abs=1e-14)


def test_fractional_outcomes_are_mixtures():
    half, both = calibration([0.7, 0.7], [0.5, 0.5]), calibration([0.7, 0.7], [0, 1])
    for key in ("ece", "brier", "log_loss", "accuracy"):
        assert half[key] == pytest.approx(both[key])


def test_winner_confidence():
    confidences, right = winner_confidence([2, 0, 1, 1000], [0, 2, 1, -1000])
    sure = 1 / (1 + math.exp(-2))
    assert confidences == pytest.approx([sure, sure, 0.5, 1.0])
    assert right.tolist() == [1, 0, 0.5, 1]


def test_bradley_terry_is_calibrated_and_scaled_scores_are_not():
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


def test_log_loss_equals_the_reward_model_loss():
    chosen, rejected = [0.3, -2.0, 900.0], [1.0, -2.0, 0.0]
    expected = statistics.mean(math.log1p(math.exp(r - c)) for c, r in zip(chosen, rejected, strict=True))
    assert preference_calibration(chosen, rejected)["log_loss"] == pytest.approx(expected)
    assert preference_calibration([0.0], [900.0])["log_loss"] == 900


def test_bin_intervals_resample_whole_groups():
    generator = np.random.default_rng(0)
    outcomes = np.repeat(generator.random(30) < 0.7, 5)
    alone, grouped = (
        calibration([0.7] * 150, outcomes, groups=groups)["bins"][0]["interval"] for groups in (None, np.repeat(range(30), 5))
    )
    assert np.ptp(grouped) > 1.8 * np.ptp(alone)


def test_error_by_chance_counts_equal_events_once():
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
    """Confidences that lie `gap` above the frequencies, with outcomes and prompts."""
    confidences = gap + (1 - gap) * generator.random(len(groups))
    return confidences, (generator.random(len(groups)) < confidences - gap).astype(float), groups.tolist()


def test_calibration_difference_by_hand():
    """All prompts have the same gaps: -.2 in one bin, .5 in another."""
    difference = calibration_difference(([0.7] * 20, [0.5] * 20, range(20)), ([0.5] * 20, [1.0] * 20, range(20)))
    assert difference["ece"] == {"mean": pytest.approx(0.2 - 0.5), "interval": pytest.approx([-0.3, -0.3]), "n": 20}
    assert difference["brier"]["mean"] == pytest.approx((0.5 * 0.3**2 + 0.5 * 0.7**2) - 0.5**2)


def test_calibration_difference_is_near_the_plain_difference():
    generator = np.random.default_rng(0)
    groups, others = np.repeat(np.arange(400), 3), np.arange(400)
    one, other = predictions(generator, groups, 0.4), predictions(generator, others, 0.1)
    difference = calibration_difference(one, other)
    plain = [calibration(*one[:2]), calibration(*other[:2])]
    assert difference["brier"]["mean"] == pytest.approx(plain[0]["brier"] - plain[1]["brier"])
    assert difference["ece"]["mean"] == pytest.approx(plain[0]["ece"] - plain[1]["ece"], abs=0.05)
    for name in ("ece", "brier"):
        low, high = difference[name]["interval"]
        assert 0 < low < difference[name]["mean"] < high
        assert difference[name]["n"] == 400
    # the same answers five times over say nothing new
    again = calibration_difference(*([np.repeat(column, 5) for column in side] for side in (one, other)))
    assert again["ece"]["interval"] == pytest.approx(difference["ece"]["interval"])
    assert calibration_difference(one, one)["ece"] == {"mean": 0, "interval": None, "n": 400}


@pytest.mark.parametrize(("gaps", "truth"), [((0.0, 0.0), 0.0), ((0.3, 0.0), 0.3)])
def test_calibration_difference_interval_covers_the_truth(gaps, truth):
    """Also where one of the two says little, whose error is large by chance alone."""
    hits, surely, runs = 0, 0, 60
    for run in range(runs):
        generator = np.random.default_rng(run)
        groups, others = np.repeat(np.arange(150), 2), generator.permutation(150)[:40]
        one, other = predictions(generator, groups, gaps[0]), predictions(generator, others, gaps[1])
        low, high = calibration_difference(one, other, seed=run)["ece"]["interval"]
        hits += low <= truth <= high
        surely += calibration(*one[:2])["ece"] + 0.02 < calibration(*other[:2])["ece"]
    assert hits / runs >= 0.9
    assert (surely / runs > 0.9) == (truth == 0)  # what the plain difference says


def test_calibration_difference_rejects_bad_inputs():
    with pytest.raises(ValueError, match=r"`confidences` must be in \[0.0, 1\]"):
        calibration_difference(([0.5], [1], [0]), ([1.5], [1], [0]))
    with pytest.raises(ValueError, match="`groups` has 3 entries for 2"):
        calibration_difference(([0.5], [1], [0, 1]), ([0.5], [1], [0]))
