"""A reward model on held-out comparisons."""

import itertools
import json
import math

from rlhf_recipes.evaluation.metrics.accuracy import ranking_tau
from rlhf_recipes.evaluation.metrics.intervals import wilson_interval
from rlhf_recipes.evaluation.metrics.scores import score_distribution, score_length
from rlhf_recipes.evaluation.reward_evaluation import evaluate_reward
from support.evaluations import noisy_rankings

import numpy as np
import pytest


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
