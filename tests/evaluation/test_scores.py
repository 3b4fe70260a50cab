"""Scores of rewards against hand-computed cases, brute force, SciPy 1.17 and simulation."""

import itertools
import json
import math
import statistics

from rlhf_recipes.evaluation.metrics import intervals as resampling
from rlhf_recipes.evaluation.metrics.intervals import share_interval, wilson_interval
from rlhf_recipes.evaluation.metrics.scores import kendall_tau, pair_accuracy, ranking_tau, score_distribution, score_length
from rlhf_recipes.evaluation.reward_evaluation import evaluate_reward
from support.evaluations import noisy_rankings

import numpy as np
import pytest


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
def test_interval_of_independent_comparisons_is_wilson(right, n, low, high):
    assert wilson_interval(right / n, n) == pytest.approx([low, high], abs=1e-12)
    outcomes = np.arange(n) < right
    for groups in (None, [f"prompt {number}" for number in range(n)]):
        assert pair_accuracy(outcomes, ~outcomes, groups=groups)["interval"] == pytest.approx([low, high], abs=1e-12)


def test_accuracy_by_quartile_keeps_equal_margins_together():
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


def test_accuracy_by_length():
    result = pair_accuracy([1, 1, 0, 1], [0, 0, 1, 0], chosen_lengths=[9, 9, 9, 1], rejected_lengths=[3, 3, 3, 3])["by_length"]
    assert {name: (part["n"], part["accuracy"]) for name, part in result.items()} == {
        "chosen_longer": (3, 2 / 3),
        "chosen_shorter": (1, 1.0),
        "same_length": (0, None),
    }
    assert result["same_length"]["interval"] is None
    with pytest.raises(ValueError, match="rejected_lengths"):
        pair_accuracy([1], [0], chosen_lengths=[3])


def test_bootstrap_resamples_whole_groups():
    """Of two groups, a quarter of the draws has the first twice; many groups agree with the normal approximation."""
    assert share_interval(np.array([1.0, 1, 1, 0]), np.array([0, 0, 0, 1])) == [0.0, 1.0]
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 7, 2000)
    codes = np.repeat(np.arange(2000), sizes)
    values = (generator.random(len(codes)) < np.repeat(generator.random(2000) * sizes / 6, sizes)).astype(float)
    mean = values.mean()
    residuals = [(values[codes == code] - mean).sum() for code in range(2000)]
    half = 1.96 * math.sqrt(sum(r * r for r in residuals)) / len(values)
    assert share_interval(values, codes) == pytest.approx([mean - half, mean + half], abs=0.003)


@pytest.mark.parametrize(("right", "expected"), [([1, 1, 1, 1], 1.0), ([0, 1, 1, 0], 0.5)])
def test_equal_groups_count_as_one_observation_each(right, expected):
    groups = ["a", "a", "b", "b"]
    assert pair_accuracy(right, np.subtract(1, right), groups=groups)["interval"] == wilson_interval(expected, 2)
    assert pair_accuracy(right, np.subtract(1, right), groups=["a"] * 4)["interval"] == wilson_interval(expected, 1)


def test_intervals_cover_the_truth_at_95_percent(monkeypatch):
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
def test_kendall_tau(first, second, tau):
    assert kendall_tau(first, second) == pytest.approx(tau)


def test_ranking_tau_is_a_mean_in_which_low_ranks_are_good():
    result = ranking_tau([[3, 2, 1], [0, 1], [5, 5], [1, 2]], [[1, 2, 3], [1, 2], [1, 2], [1, 1]])
    assert result["tau"] == pytest.approx((1 - 1 + 0) / 3)
    assert (result["rankings"], result["tied_scores"], result["tied_ranks"]) == (3, 1, 1)
    assert result["interval"][0] < 0 < result["interval"][1]


def test_tau_interval_resamples_whole_prompts():
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


def test_tau_without_variation_has_no_interval():
    for count in (1, 2):
        result = ranking_tau([[1, 0]] * count, [[1, 2]] * count)
        assert (result["tau"], result["interval"]) == (1.0, None)
    nothing = {"tau": None, "interval": None, "rankings": 0, "tied_scores": 0, "tied_ranks": 1}
    assert ranking_tau([[1, 0]], [[1, 1]]) == nothing


# --- Length and distribution -----------------------------------------------------------------------------

SCORES, LENGTHS = [0.5, 1.5, 1.5, -2, 3, 0.7, 0.1], [12, 30, 25, 25, 80, 25, 3]


def test_correlations_equal_scipy():
    result = score_length(SCORES, LENGTHS)
    assert result["pearson"] == pytest.approx(0.6386963216614707)
    assert result["spearman"] == pytest.approx(0.7479575920067658)
    assert (result["n"], result["n_within"], result["pearson_within"]) == (7, 0, None)


def test_correlation_within_prompts_ignores_differences_between_them():
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


# --- A reward model on held-out comparisons --------------------------------------------------------------


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
    every = [group for group, row in zip(groups, scores, strict=True) for _ in row]
    flat_scores, flat_lengths = (list(itertools.chain(*rows)) for rows in (scores, lengths))
    assert result["score_length"] == score_length(flat_scores, flat_lengths, groups=every)
    assert result["scores"] == score_distribution(flat_scores)


def test_evaluate_reward_is_json_and_reproducible():
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
    ("scores", "ranks", "options", "message"),
    [
        ([[1, 2]], [[1, 1]], {}, "nothing to compare"),
        ([], [], {}, "nothing to compare"),
        ([[1, math.nan]], [[1, 2]], {}, "not finite"),
        ([[1, 2, 3]], [[1, 2, 3]], {"margins": [1]}, "`margins`"),
        ([[1, 2]], [[1, 2]], {"margins": [1, 2]}, "`margins`"),
    ],
)
def test_invalid_rankings_are_rejected(scores, ranks, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_reward(scores, ranks, [[1] * len(row) for row in scores], **options)
