"""PPO's formulas against plain references and against cases worked out by hand."""

import itertools
import math

from rlhf_recipes.training.ppo.maths import (
    KLController,
    Moments,
    ScoreScaling,
    approximate_kl,
    explained_variance,
    gae,
    kl_estimate,
    masked_sum,
    token_rewards,
    value_loss,
    whiten,
)

import pytest
import torch

B, T = 5, 7


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def mask():
    """Completions of full length, of one token, of none, with a hole where a tool replied, and of three tokens."""
    rows = [[1] * T, [1] + [0] * (T - 1), [0] * T, [1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]]
    return torch.tensor(rows)


def numbers(tensor, mask):
    """Return the values where the mask is 1 as a list."""
    return [value.item() for value, kept in zip(tensor.flatten(), mask.flatten(), strict=True) if kept]


# --- Moments, means, whitening ---------------------------------------------------------------------------


def test_moments_of_masked_values(draw, mask):
    values = draw(B, T) * 3 + 100
    kept = torch.tensor(numbers(values, mask), dtype=torch.float64)
    moments = Moments.of(values, mask)
    assert moments.count == mask.sum()
    assert moments.mean == pytest.approx(kept.mean().item())
    assert moments.variance == pytest.approx(kept.var().item())


def test_moments_of_parts_add_up(draw):
    values = draw(30) + 1e4  # where sums of squares in fp32 would lose everything
    parts = [Moments.of(part) for part in values.split([1, 9, 20])]
    total, whole = sum(parts, Moments()), Moments.of(values)
    assert total.mean == pytest.approx(whole.mean, rel=1e-12)
    assert total.squares == pytest.approx(whole.squares, rel=1e-9)


@pytest.mark.parametrize("values", [[], [2.5]])
def test_moments_of_too_few_values_have_no_variance(values):
    moments = Moments.of(torch.tensor(values)) + Moments()
    assert (moments.count, moments.variance, moments.std) == (len(values), 0.0, 0.0)


def test_masked_sum_ignores_masked_values(draw, mask):
    values = draw(B, T)
    expected = sum(numbers(values, mask))
    assert masked_sum(values.masked_fill(mask == 0, math.nan), mask).item() == pytest.approx(expected)
    assert masked_sum(values, torch.zeros_like(mask)).item() == 0


def test_whitened_values_have_mean_0_and_variance_1(draw, mask):
    values = draw(B, T) * 4 + 2
    white = whiten(values, mask, Moments.of(values, mask))
    moments = Moments.of(white, mask)
    assert moments.mean == pytest.approx(0, abs=1e-6)
    assert moments.variance == pytest.approx(1, abs=1e-5)
    assert not white[mask == 0].any()


def test_whitening_without_shifting_keeps_the_mean(draw, mask):
    values = draw(B, T) * 4 + 2
    moments = Moments.of(values, mask)
    white = whiten(values, mask, moments, shift_mean=False)
    assert Moments.of(white, mask).mean == pytest.approx(moments.mean, abs=1e-5)


def test_equal_values_whiten_to_0():
    values, mask = torch.full((2, 3), 0.7), torch.ones(2, 3)
    assert whiten(values, mask, Moments.of(values, mask)).abs().max() < 1e-3


# --- Rewards ---------------------------------------------------------------------------------------------


def test_kl_estimators_are_unbiased_and_k3_is_never_negative():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    truth = (policy * (policy / reference).log()).sum()
    for estimator in ("k1", "k3"):
        estimates = kl_estimate(policy.log(), reference.log(), estimator)
        assert (policy * estimates).sum().item() == pytest.approx(truth.item(), rel=1e-5)
    assert (estimates >= 0).all()


def test_k3_is_precise_where_policy_and_reference_almost_agree():
    gap = torch.tensor(1e-4)
    assert kl_estimate(gap, torch.tensor(0.0), "k3").item() == pytest.approx(gap.item() ** 2 / 2, rel=1e-2)


def test_score_is_paid_at_the_last_token_and_the_penalty_at_each(draw, mask):
    scores, kl = draw(B), draw(B, T)
    rewards = token_rewards(scores, kl, mask, kl_coef=0.1)
    for row, column in itertools.product(range(B), range(T)):
        last = max((place for place in range(T) if mask[row, place]), default=None)
        expected = -0.1 * kl[row, column] * mask[row, column] + (scores[row] if column == last else 0)
        assert rewards[row, column].item() == pytest.approx(float(expected), abs=1e-6)


def test_rewards_of_completions_of_one_token_by_hand():
    rewards = token_rewards(
        torch.tensor([2.0, -1.0]), torch.tensor([[0.5, 9.0], [0.25, 9.0]]), torch.tensor([[1, 0], [1, 0]]), 0.2
    )
    assert rewards.tolist() == [[pytest.approx(1.9), 0.0], [pytest.approx(-1.05), 0.0]]


def test_scores_are_scaled_by_running_moments_and_then_clipped(draw):
    seen, new = draw(50) * 3 + 5, draw(8) * 3 + 5
    scaling = ScoreScaling(scale=True, center=True, clip=1.0)
    for part in seen.split(10):
        scaling.update(Moments.of(part))
    expected = ((new - seen.mean()) / seen.std()).clamp(-1, 1)
    assert torch.allclose(scaling(new), expected, atol=1e-5)
    scaling.center = False
    assert torch.allclose(scaling(new), (new / seen.std()).clamp(-1, 1), atol=1e-5)
    assert torch.equal(ScoreScaling()(new), new)


def test_kl_controller_by_hand():
    controller = KLController(0.1, target=6.0, horizon=1000)
    controller.update(kl=6.6, samples=100)  # 10% too high: 0.1 * (1 + 0.1 * 100 / 1000)
    assert controller.coefficient == pytest.approx(0.101)
    controller.update(kl=600.0, samples=100)  # the error counts as 20% at most
    assert controller.coefficient == pytest.approx(0.101 * 1.02)
    controller.update(kl=0.0, samples=100)
    assert controller.coefficient == pytest.approx(0.101 * 1.02 * 0.98)
    fixed = KLController(0.1)
    fixed.update(kl=600.0, samples=100)
    assert fixed.coefficient == 0.1


# --- Advantages ------------------------------------------------------------------------------------------


def reference_gae(rewards, values, gamma, lam):
    """Return advantages of one completion by the definition: discounted sums of temporal-difference errors."""
    length = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_discounted_sum_of_errors_over_written_tokens(draw, mask, gamma, lam):
    rewards, values = draw(B, T), draw(B, T)
    advantages, returns = gae(rewards.masked_fill(mask == 0, 7.0), values.masked_fill(mask == 0, 9.0), mask, gamma, lam)
    for row in range(B):
        kept = mask[row].nonzero().flatten().tolist()
        expected = reference_gae(rewards[row, kept].tolist(), values[row, kept].tolist(), gamma, lam)
        assert advantages[row, kept].tolist() == pytest.approx(expected, abs=1e-5)
        assert returns[row, kept].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, values[row, kept].tolist(), strict=True)], abs=1e-5
        )
    assert not advantages[mask == 0].any()
    assert not returns[mask == 0].any()


def test_gae_by_hand():
    # delta_1 = 1 - 0.5 = 0.5; delta_0 = -0.1 + 0.9 * 0.5 - 0.2 = 0.15; A_0 = 0.15 + 0.9 * 0.8 * 0.5 = 0.51
    advantages, returns = gae(torch.tensor([[-0.1, 1.0]]), torch.tensor([[0.2, 0.5]]), torch.ones(1, 2), 0.9, 0.8)
    assert advantages[0].tolist() == pytest.approx([0.51, 0.5])
    assert returns[0].tolist() == pytest.approx([0.71, 1.0])


def test_returns_with_lambda_1_are_sums_of_rewards(draw):
    rewards, values = draw(3, 4), draw(3, 4)
    _, returns = gae(rewards, values, torch.ones(3, 4), 1.0, 1.0)
    assert torch.allclose(returns, rewards.flip(1).cumsum(1).flip(1), atol=1e-5)


# --- Losses ----------------------------------------------------------------------------------------------


def test_value_loss_is_the_sum_of_the_larger_errors(draw, mask):
    values, old, returns = draw(B, T), draw(B, T), draw(B, T)
    total, clipped = value_loss(values, old, returns, mask, cliprange=0.2)
    expected, count = 0.0, 0
    for row, column in mask.nonzero().tolist():
        v, o, r = (tensor[row, column].item() for tensor in (values, old, returns))
        near = min(max(v, o - 0.2), o + 0.2)
        expected += 0.5 * max((v - r) ** 2, (near - r) ** 2)
        count += (near - r) ** 2 > (v - r) ** 2
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert clipped.item() == count


def test_value_beyond_the_clip_range_has_no_gradient():
    values = torch.tensor([[0.5, 0.1]], requires_grad=True)
    total, clipped = value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), cliprange=0.2)
    total.backward()
    assert values.grad.tolist() == [[0.0, pytest.approx(-0.9)]]
    assert clipped == 1
    free, none = value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), cliprange=None)
    assert (free.item(), none.item()) == (pytest.approx(0.5 * (0.25 + 0.81)), 0)


def test_approximate_kl_is_from_the_old_policy_to_the_new_one():
    old, new = torch.tensor([0.7, 0.3]), torch.tensor([0.4, 0.6])
    # tokens in proportion to the old policy, so that the mean over them is the expectation
    tokens, mask = torch.tensor([0] * 7 + [1] * 3), torch.ones(10)
    estimate = approximate_kl(new.log()[tokens], old.log()[tokens], mask) / 10
    assert estimate.item() == pytest.approx((old * (old / new).log()).sum().item(), rel=1e-5)
    assert approximate_kl(old.log(), old.log(), torch.ones(2)).item() == 0


def test_explained_variance_of_perfect_constant_and_wrong_critics():
    returns = torch.tensor([1.0, 2.0, 4.0])
    total = Moments.of(returns)
    assert explained_variance(Moments.of(returns - returns), total) == 1
    assert explained_variance(Moments.of(returns - 5), total) == pytest.approx(0)
    assert explained_variance(Moments.of(returns + returns), total) == pytest.approx(-3)
    assert math.isnan(explained_variance(total, Moments.of(torch.ones(3))))


def test_numbers_of_trl_1_12_for_completions_of_full_length(draw):
    """The formulas of TRL's PPO, step by step. It gave shorter completions one token more (docs/from_trl_ppo.md)."""
    scores, kl, values, new_values = draw(B), draw(B, T), draw(B, T), draw(B, T)
    mask, gamma, lam, kl_coef, cliprange = torch.ones(B, T), 0.97, 0.9, 0.05, 0.2

    # the score at the last token, the penalty at each
    expected = -kl_coef * kl
    expected[:, -1] += scores
    rewards = token_rewards(scores, kl, mask, kl_coef)
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)

    # generalised advantage estimation, backwards
    carried, columns = torch.zeros(B), []
    for t in reversed(range(T)):
        following = values[:, t + 1] if t + 1 < T else 0.0
        carried = expected[:, t] + gamma * following - values[:, t] + gamma * lam * carried
        columns.insert(0, carried)
    plain = torch.stack(columns, dim=1)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(returns, plain + values, atol=1e-5, rtol=0)

    # whitening, with the unbiased variance
    white = (plain - plain.mean()) * torch.rsqrt(plain.var(unbiased=True) + 1e-8)
    torch.testing.assert_close(whiten(advantages, mask, Moments.of(advantages, mask)), white, atol=1e-5, rtol=0)

    # the value loss: half the mean of the larger square
    near = torch.clamp(new_values, values - cliprange, values + cliprange)
    squares = torch.max((new_values - returns) ** 2, (near - returns) ** 2)
    total, _ = value_loss(new_values, values, returns, mask, cliprange)
    torch.testing.assert_close(total / mask.sum(), 0.5 * squares.mean(), atol=1e-5, rtol=0)
