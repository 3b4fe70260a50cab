"""Distribution of scores and correlation with length, against SciPy 1.17 and hand-computed cases."""

import math
import statistics

from rlhf_recipes.evaluation.metrics.scores import score_distribution, score_length

import numpy as np
import pytest

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
