"""Metrics of policies against hand-computed cases and brute force, and all metrics as `evaluate.Metric`s."""

import doctest
import importlib
import itertools
import json
import math

from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.evaluation.metrics import calibration, comparison, scores, texts
from rlhf_recipes.evaluation.metrics.calibration import Calibration
from rlhf_recipes.evaluation.metrics.comparison import (
    BestOfN,
    Divergence,
    WinRate,
    best_of_n,
    best_of_n_kl,
    divergence,
    win_rate,
)
from rlhf_recipes.evaluation.metrics.length_control import length_controlled
from rlhf_recipes.evaluation.metrics.perplexity import perplexity
from rlhf_recipes.evaluation.metrics.scores import PairAccuracy, RankingTau, ScoreLength
from rlhf_recipes.evaluation.metrics.texts import Diversity, Truthfulness, distinct_n, repetition, self_bleu

import evaluate
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(autouse=True)
def _metrics_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


# --- Win rate --------------------------------------------------------------------------------------------


def test_win_rate_counts_ties_as_one_half():
    result = win_rate([3, 1, 2, 2], [1, 3, 2, 0])  # won, lost, tied, won
    assert (result["win_rate"], result["ties"], result["n"], result["prompts"]) == (2.5 / 4, 1, 4, 4)
    low, high = win_rate([1.0] * 50, [0.0] * 50)["interval"]
    assert 0.9 < low < high == 1


def test_win_rate_resamples_whole_prompts():
    generator = np.random.default_rng(0)
    once = generator.normal(size=60)
    apart = win_rate(once, np.zeros(60))["interval"]
    repeated = win_rate(np.repeat(once, 50), np.zeros(3000), groups=np.repeat(np.arange(60), 50).tolist())["interval"]
    assert repeated == pytest.approx(apart, abs=1e-9)  # 50 copies of each say nothing new
    blind = win_rate(np.repeat(once, 50), np.zeros(3000))["interval"]
    assert blind[1] - blind[0] < (apart[1] - apart[0]) / 5


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_equals_brute_force(n):
    scores = np.array([[0.3, -1.0, 2.0, 0.7, 0.1], [5.0, 4.0, 4.5, -2.0, 0.0]])
    brute = [np.mean([max(chosen) for chosen in itertools.combinations(row, n)]) for row in scores]
    assert best_of_n(scores, n) == pytest.approx(brute)


def test_best_of_n_by_another_reward_shares_ties():
    scores, values = [[1.0, 1.0, 0.0]], [[10.0, 20.0, 99.0]]
    # of the three pairs, the best is one of the two that tie, at random or alone
    assert best_of_n(scores, 2, values)[0] == pytest.approx((15 + 10 + 20) / 3)
    assert best_of_n(scores, 3, values)[0] == pytest.approx(15)


def test_best_of_n_is_unbiased():
    generator = np.random.default_rng(0)
    samples = generator.random((20_000, 6))
    assert best_of_n(samples, 4).mean() == pytest.approx(4 / 5, abs=0.005)  # the largest of n uniform numbers: n / (n + 1)


def test_best_of_n_kl_equals_the_integral():
    # Of a uniform score u the best of n has density n u^(n-1): the integral of density * log density, by the midpoint rule
    for n in (1, 2, 4, 16):
        middles = (np.arange(200_000) + 0.5) / 200_000
        density = n * middles ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(float(np.mean(density * np.log(density))), abs=1e-3)


def test_divergence_estimates_exact_kl_and_entropy():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.5, 0.3])
    samples = np.random.default_rng(0).choice(3, size=50_000, p=p)
    result = divergence(np.log(p)[samples], np.log(q)[samples])
    for name, exact in (("kl", float(p @ np.log(p / q))), ("entropy", float(-p @ np.log(p)))):
        assert result[name] == pytest.approx(exact, abs=0.02)
        low, high = result[f"{name}_interval"]
        assert low < result[name] < high
        assert high - low < 0.05
    alike = divergence([-1.0, -2.0], [-1.0, -2.0])
    assert (alike["kl"], alike["kl_interval"]) == (0, None)


def test_distinct_n():
    texts = ["the cat sat", "The cat ran."]
    assert distinct_n(texts, 1) == 4 / 6
    assert distinct_n(texts, 2) == 3 / 4
    assert distinct_n(["word"], 2) is None


def test_self_bleu_of_equal_and_of_unrelated_texts():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1)
    assert self_bleu(["a b", "c d", "e f"]) == 0
    assert self_bleu(["a b", ""]) is None


def test_self_bleu_by_hand():
    # "a a b" against "a b c": 1-grams a (clipped to 1), b: 2 of 3; 2-grams "a b": 1 of 2; no 3-gram: 0
    assert self_bleu(["a a b", "a b c"]) == 0
    # "a b" against "a b b": both n-grams match, but it is shorter: exp(1 - 3 / 2); "a b b": 2 of 3 and 1 of 2, no 3-gram: 0
    assert self_bleu(["a b", "a b b"]) == pytest.approx(math.exp(-0.5) / 2)


def test_self_bleu_equals_brute_force():
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(list("abc"), size=generator.integers(1, 9))) for _ in range(25)]
    rows = [text.split() for text in texts]
    assert self_bleu(texts) == pytest.approx(np.mean([slow_bleu(rows[i], rows[:i] + rows[i + 1 :]) for i in range(25)]))


def slow_bleu(words, references):
    def count(text, ngram):
        return sum(tuple(text[start : start + len(ngram)]) == ngram for start in range(len(text)))

    logs = []
    for n in range(1, min(4, len(words)) + 1):
        ngrams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
        matches = sum(min(count(words, g), max(count(text, g) for text in references)) for g in set(ngrams))
        if not matches:
            return 0
        logs.append(math.log(matches / len(ngrams)))
    nearest = min(map(len, references), key=lambda length: (abs(length - len(words)), length))
    return math.exp(np.mean(logs)) * (1 if len(words) >= nearest else math.exp(1 - nearest / len(words)))


def test_diversity_within_and_across_prompts():
    texts = ["red", "red", "blue", "blue"]
    result = Diversity().compute(predictions=texts, groups=[0, 0, 1, 1])
    assert result["self_bleu_within"] == 1  # each prompt has one answer only
    assert result["self_bleu"] == 0  # they differ between prompts
    assert Diversity().compute(predictions=texts)["self_bleu_within"] is None


def test_repetition():
    assert repetition(["a b c a b c", "x y z"]) == pytest.approx((1 / 4 + 0) / 2)


def test_truthfulness_by_kind():
    predictions = ["Larkhill.", "  larkhill ", "I do not know.", "i do  not know, sorry", "Dunmere.", "", "Larkhill Dunmere"]
    result = Truthfulness().compute(predictions=predictions, references=["Larkhill."] * 7)
    assert result == pytest.approx({"right": 2 / 7, "abstained": 2 / 7, "made_up": 3 / 7})
    result = Truthfulness().compute(predictions=["NYC.", "Rome"], references=[["New York", "nyc"], ["Paris", "Lutetia"]])
    assert result == {"right": 0.5, "abstained": 0, "made_up": 0.5}
    options = {"references": ["x", "x"], "abstentions": ("no idea",)}
    result = Truthfulness().compute(predictions=["No idea!", "I do not know"], **options)
    assert result == {"right": 0, "abstained": 0.5, "made_up": 0.5}


# --- As metrics of `evaluate` ----------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "examples"), [(calibration, 1), (comparison, 3), (scores, 3), (texts, 2)])
def test_docstring_examples(module, examples):
    assert doctest.testmod(module) == (0, examples)


@pytest.mark.parametrize(
    ("metric", "function", "predictions", "references", "options"),
    [
        (PairAccuracy, scores.pair_accuracy, [2.0, 0.5, 1.0], [1.0, 0.5, 3.0], {"groups": ["a", "a", "b"], "seed": 5}),
        (RankingTau, scores.ranking_tau, [[1.0, 2.0], [3.0, 1.0, 2.0]], [[2, 1], [1, 2, 2]], {"seed": 5}),
        (Calibration, calibration.calibration, [0.1, 0.6, 0.9], [0, 1, 1], {"bins": 3}),
        (Calibration, calibration.calibration, [0.1, 0.6, 0.9], [False, True, True], {}),
        (ScoreLength, scores.score_length, [0.5, 1.5, -2.0], [12, 30, 25], {"groups": [1, 1, 2]}),
    ],
)
def test_metrics_equal_their_functions(metric, function, predictions, references, options):
    expected = function(predictions, references, **options)
    assert metric().compute(predictions=predictions, references=references, **options) == expected
    batched = metric()
    for prediction, reference in zip(predictions, references, strict=True):
        batched.add(prediction=prediction, reference=reference)
    assert batched.compute(**options) == expected
    assert metric().info.description == metric.__doc__


def test_results_are_json():
    results = [
        WinRate().compute(predictions=[1.0], references=[0.0]),
        BestOfN().compute(predictions=[[1.0, 2.0], [0.0, 4.0]], n=2),
        Divergence().compute(predictions=[-1.0], references=[-2.0]),
        Diversity().compute(predictions=["a b c"]),
    ]
    assert results[1]["score"] == 3
    assert results[1]["kl_bound"] == pytest.approx(math.log(2) - 0.5)
    json.dumps(results, allow_nan=False)


def test_the_evaluate_library_is_importable_beside_the_recipe():
    """A launched recipe has its folder first on the path, and there is an `evaluate.py` in it."""
    assert hasattr(importlib.import_module("evaluate"), "Metric")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores.pair_accuracy([], []), "`chosen` is empty"),
        (lambda: scores.pair_accuracy([1, 2], [1]), r"one length .*\(2,\).*\(1,\)"),
        (lambda: scores.pair_accuracy([1, math.nan], [1, 2]), r"`chosen` has 1 .* not finite, the first \(nan\) at 1"),
        (lambda: scores.pair_accuracy([1, 2], [1, 2], groups=[1]), "`groups` has 1 entries for 2"),
        (lambda: calibration.calibration([1.2], [1]), r"`confidences` must be in \[0.0, 1\].* 1.2"),
        (lambda: calibration.calibration([0.4], [1], low=0.5), r"in \[0.5, 1\]"),
        (lambda: calibration.calibration([0.5], [2]), "`outcomes`"),
        (lambda: comparison.share_won([2.0]), r"\[0, 1\]"),
        (lambda: best_of_n([[1.0, 2.0]], 3), "1 to 2"),
        (lambda: best_of_n([[1.0, math.nan]], 1), "finite"),
        (lambda: texts.truthfulness([], []), "no answers"),
    ],
)
def test_invalid_inputs_are_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- Win rates at equal length -----------------------------------------------------------------------------


def judged(preference, longer, prompts=300, answers=4, seed=0):
    """Return credits, lengths, others and prompts of a judge that prefers long answers by `longer`."""
    rng = np.random.default_rng(seed)
    lengths, others = rng.normal(60, 15, (2, prompts, answers))
    lengths += 10
    differences = lengths - others
    logits = preference + longer * np.tanh(differences / differences.std()) + rng.normal(0, 0.7, (prompts, 1))
    credits = (rng.random((prompts, answers)) < 1 / (1 + np.exp(-logits))).astype(float)
    return credits.ravel(), lengths.ravel(), others.ravel(), np.repeat(np.arange(prompts), answers).tolist()


@pytest.mark.parametrize(("preference", "longer"), [(0.0, 1.5), (0.5, 1.5), (-0.5, 0.0)])
def test_length_is_taken_out_of_win_rates(preference, longer):
    *columns, groups = judged(preference, longer)
    result = length_controlled(*columns, groups=groups)
    low, high = result["interval"]
    assert low <= 1 / (1 + math.exp(-0.9 * preference)) <= high  # 0.9: the mean over prompts lies nearer to one half
    assert high - low < 0.1
    if longer:
        assert result["phi"] > 1
        assert result["win_rate"] < columns[0].mean() - 0.05


def test_the_model_of_length_is_a_penalised_logistic_regression():
    credits, lengths, others, groups = (column[:80] for column in judged(0.3, 1.0))
    credits = np.where(np.arange(80) % 7 == 0, 0.5, credits)
    differences = lengths - others
    features = np.column_stack(
        [np.full(80, 100.0), 100 * np.tanh(differences / differences.std()), np.equal.outer(groups, np.unique(groups))]
    )  # a precision of 1e-4 is one of 1 where the column is 100 times as large
    model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=10_000)
    model.fit(np.vstack([features, features]), np.repeat([1, 0], 80), np.concatenate([credits, 1 - credits]))
    result = length_controlled(credits, lengths, others, groups=groups)
    assert result["phi"] == pytest.approx(100 * model.coef_[0, 1], rel=1e-4)
    features[:, 1] = 0
    assert result["win_rate"] == pytest.approx(model.predict_proba(features)[:, 1].mean(), rel=1e-4)


def test_equal_lengths_leave_the_win_rate_as_it_is():
    credits, lengths, _, groups = judged(0.4, 0.0, prompts=50)
    assert length_controlled(credits, lengths, lengths, groups=groups)["win_rate"] == pytest.approx(credits.mean(), abs=1e-3)
    won = length_controlled([1.0] * 9, range(9), [4] * 9)
    assert won["interval"][0] < 0.75 < won["win_rate"]


# --- Perplexity ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    path = resolve_path("rlhf_recipes.tiny.base")
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


TEXTS = ["Where does Porira live?", "I do not know.", "Wewuri lives in Larkhill. Kogahi works as a dyer.", "Elmstow."]


def test_perplexity_is_exp_of_the_mean_token_loss_at_any_batch_size(base):
    model, tokenizer = base
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logps = model(ids).logits.log_softmax(-1)
        for place in range(ids.size(1) - 1):
            total -= logps[0, place, ids[0, place + 1]].item()
            count += 1
    for batch_size in (1, 3, 16):
        assert perplexity(model, tokenizer, TEXTS, batch_size=batch_size) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_texts_are_cut_off_and_the_mode_of_the_model_is_restored(base):
    model, tokenizer = base
    model.train()
    ids = torch.tensor(tokenizer(TEXTS[2])["input_ids"][:4])
    logps = model(ids[None]).logits[0].log_softmax(-1)
    expected = -sum(logps[place, ids[place + 1]].item() for place in range(3)) / 3
    assert perplexity(model, tokenizer, TEXTS[2:3], max_length=4) == pytest.approx(math.exp(expected), rel=1e-4)
    assert model.training


def test_texts_of_one_token_are_rejected(base):
    model, tokenizer = base
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(model, tokenizer, ["Elmstow."], max_length=1)
