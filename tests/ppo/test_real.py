"""PPO on a small real model: `stories3M` learns to tell cheerful stories, at a bounded KL."""

from importlib import import_module

from support import ROOT

import pytest


@pytest.fixture
def bench(monkeypatch):
    """`benchmarks/real_ppo.py`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("real_ppo")


@pytest.mark.real
@pytest.mark.slow
def test_reward_rises_at_a_bounded_kl(shared, bench):
    options = {"per_device_train_batch_size": 32, "max_completion_length": 32, "value_warmup_steps": 2, "warmup_steps": 2}
    result = bench.run(shared, seed=0, ptx_coef=0.5, steps=16, measured=40, learning_rate=1e-3, ptx_batch_size=4, **options)
    assert result.rise >= 0.2, "in standard deviations, from a twelfth of the benchmark's tokens"
    assert 0 < result.kl < 10
    assert result.perplexity_after < 1.3 * result.perplexity_before


def test_cheerfulness_counts_three_different_words_at_most(bench):
    texts = ["A dog.", "She smiled.", "She smiled and smiled and smiled.", "Happy! He laughed, hugged her, and had fun."]
    assert bench.cheerfulness(texts) == [0.0, pytest.approx(1 / 3), pytest.approx(1 / 3), 1.0]
