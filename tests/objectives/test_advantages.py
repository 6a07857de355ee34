"""Golden numbers were computed apart from the code, in numpy with ddof 1, unless the formula stands beside them."""

import math
from fractions import Fraction

import pytest
import torch
from trl.trainer.utils import nanstd

from posttrain.objectives.advantages import (
    group_mean_advantage,
    leave_one_out_advantage,
    order_statistic,
    quantile_advantage,
    success_gate,
)

NAN = float("nan")
ADVANTAGES = {
    "mean": group_mean_advantage,
    "mean_batch": lambda r: group_mean_advantage(r, scale="batch"),
    "mean_none": lambda r: group_mean_advantage(r, scale="none"),
    "quantile": quantile_advantage,
    "quantile_linear": lambda r: quantile_advantage(r, interpolation="linear"),
    "quantile_batch": lambda r: quantile_advantage(r, scale="batch"),
    "leave_one_out": leave_one_out_advantage,
}


def rows(*groups):
    return torch.tensor(groups, dtype=torch.float64)


def successes(count, group_size):
    return rows([0.0] * (group_size - count) + [1.0] * count)


def close(actual, expected, tolerance=5e-7):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected.expand_as(actual), atol=tolerance, rtol=0)


def random_rewards(seed, prompts=64, group_size=8, missing=0.0):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(prompts, group_size, generator=generator)
    return rewards.masked_fill(torch.rand(prompts, group_size, generator=generator) < missing, NAN)


def trl_advantages(rewards, scale):
    """What GRPOTrainer of TRL 1.16 computes from the summed rewards, with TRL's own deviation."""
    group_size, flat = rewards.shape[1], rewards.reshape(-1)
    mean = torch.nanmean(flat.view(-1, group_size), dim=1).repeat_interleave(group_size, dim=0)
    advantages = flat - mean
    if scale == "group":
        advantages = advantages / (nanstd(flat.view(-1, group_size), dim=1).repeat_interleave(group_size, dim=0) + 1e-4)
    if scale == "batch":
        advantages = advantages / (nanstd(flat).expand_as(flat) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0).view(-1, group_size)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("missing", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("group_size", [2, 8, 16])
def test_mean_advantages_are_trls_bit_for_bit(scale, missing, group_size):
    largest = 0.0
    for seed in range(20):
        rewards = random_rewards(seed, group_size=group_size, missing=missing)
        expected = trl_advantages(rewards, scale)
        assert torch.equal(group_mean_advantage(rewards, scale), expected)
        assert torch.equal(quantile_advantage(rewards, None, scale), expected)
        assert torch.equal(quantile_advantage(rewards, None, scale, interpolation="linear"), expected)
        largest = max(largest, expected.abs().max().item())
    assert largest > 0.5, "the comparison was of zeros"


def test_leave_one_out_is_trls_bit_for_bit():
    for seed in range(20):
        rewards = random_rewards(seed, missing=0.3)
        counts = (~rewards.isnan()).sum(dim=1, keepdim=True)
        expected = rewards - (rewards.nansum(dim=1, keepdim=True) - rewards) / (counts - 1)
        assert torch.equal(leave_one_out_advantage(rewards), torch.nan_to_num(expected, nan=0.0))


def test_leave_one_out_golden():
    # r_i minus the mean of the other three: 4 - 2, 1 - 3, 2 - 8/3, 3 - 7/3
    close(leave_one_out_advantage(rows([4, 1, 2, 3])), [[2, -2, -2 / 3, 2 / 3]], 1e-12)
    # without the unscorable one: 4 - 1.5, 1 - 3, 2 - 2.5
    close(leave_one_out_advantage(rows([4, 1, 2, NAN])), [[2.5, -2, -0.5, 0]], 1e-12)


@pytest.mark.parametrize(
    ("group", "quantile", "expected"),
    [
        ([0] * 7 + [1], 0.4, [0] * 7 + [2.827627]),
        ([1] * 7 + [0], 0.4, [0] * 7 + [-2.827627]),
        ([0, 0, 0, 1, 1, 1, 1, 1], 0.4, [-1.931810] * 3 + [0] * 5),
        ([0, 0, 0, 0, 1, 1, 1, 1], 0.4, [0] * 4 + [1.870479] * 4),
        ([0, 1, 0, 1], 0.5, [0, 1.731751, 0, 1.731751]),
        ([0.1, 0.9, 0.4, 0.4, 0.7, -0.2], 0.4, [-0.755339, 1.258898, 0, 0, 0.755339, -1.510678]),
        ([0] * 7 + [1], None, [-0.353453] * 7 + [2.474174]),
    ],
)
def test_quantile_golden_numbers(group, quantile, expected):
    close(quantile_advantage(rows(group), quantile), [expected])


@pytest.mark.parametrize(
    ("count", "eps", "extreme", "nonzero"),
    [
        (9, 1e-4, 1.951419, 9),
        (9, 1e-6, 1.951796, 9),
        (10, 1e-4, -1.999600, 6),
        (10, 1e-6, -1.999996, 6),
        (1, 1e-4, 3.998401, 1),
        (15, 1e-4, -3.998401, 1),
    ],
)
def test_quantile_golden_numbers_of_sixteen_rollouts(count, eps, extreme, nonzero):
    advantages = quantile_advantage(successes(count, 16), 0.4, eps=eps)
    assert (advantages != 0).sum() == nonzero
    close(advantages[advantages != 0], extreme)


def test_deviations_of_the_golden_groups():
    # sqrt(n p (1 - p) / (n - 1)) for binary rewards
    for count, size, value in [(1, 8, 0.35355339), (5, 8, 0.51754917), (4, 8, 0.53452248), (9, 16, 0.51234754)]:
        share = count / size
        assert math.sqrt(size * share * (1 - share) / (size - 1)) == pytest.approx(value, abs=5e-9)
        close(group_mean_advantage(successes(count, size), eps=1e-12)[0, -1], (1 - share) / value, 1e-6)


def test_the_quantile_is_the_stated_gate_for_every_group_size_and_success_count():
    # baseline at the lower value iff the share of failures is at least K, in exact arithmetic
    for size in (1, 2, 3, 5, 7, 8, 10, 16, 25, 50):
        rewards = torch.cat([successes(count, size) for count in range(size + 1)])
        for percent in range(1, 100):
            advantages = quantile_advantage(rewards, percent / 100, scale="none")
            hard = torch.tensor([Fraction(size - count, size) >= Fraction(percent, 100) for count in range(size + 1)])
            assert torch.equal(advantages, torch.where(hard[:, None], rewards, rewards - 1))


def test_order_statistic_on_the_whole_grid():
    plain_errors = 0
    for percent in range(1, 100):
        for count in range(1, 129):
            exact = math.ceil(Fraction(percent, 100) * count)
            assert order_statistic(percent / 100, count) == exact
            plain_errors += math.ceil(percent / 100 * count) != exact
    assert plain_errors == 13, "the plain ceiling has its known float errors on this grid"


@pytest.mark.parametrize(("percent", "count"), [(7, 100), (14, 50), (28, 25), (28, 50), (55, 100), (56, 25), (56, 50)])
def test_float_traps_inside_the_advantage(percent, count):
    exact = percent * count // 100
    rewards = torch.arange(count, dtype=torch.float64)[None]
    assert quantile_advantage(rewards, percent / 100, scale="none").argwhere().shape[0] == count - 1
    assert quantile_advantage(rewards, percent / 100, scale="none")[0, exact - 1] == 0


@pytest.mark.parametrize(
    ("size", "quantile", "count", "baseline"),
    [(8, 0.4, 5, 0.8), (8, 0.5, 4, 0.5), (8, 0.6, 3, 0.2), (5, 0.4, 3, 0.6), (10, 0.7, 3, 0.3)],
)
def test_linear_interpolation_mixes_the_regimes(size, quantile, count, baseline):
    rewards = successes(count, size)
    linear = quantile_advantage(rewards, quantile, scale="none", interpolation="linear")
    close(linear, rewards - baseline, 1e-12)
    assert set(quantile_advantage(rewards, quantile, scale="none").unique().tolist()) in ({0.0, 1.0}, {0.0, -1.0})


@pytest.mark.parametrize("quantile", [0.2, 0.4, 0.6, 0.8])
def test_both_interpolations_agree_at_sixteen_rollouts(quantile):
    for dtype in (torch.float32, torch.float64):
        rewards = random_rewards(0, prompts=200, group_size=16).to(dtype)
        linear = quantile_advantage(rewards, quantile, interpolation="linear")
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        close(linear.double(), quantile_advantage(rewards, quantile).double(), tolerance)


def test_extreme_quantiles_are_one_sided():
    rewards = random_rewards(1, group_size=16)
    assert (quantile_advantage(rewards, 0.01) >= 0).all()
    assert (quantile_advantage(rewards, 1 - 1 / 32) <= 0).all()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_shift_scale_and_permutation(name):
    advantage = ADVANTAGES[name]
    rewards = random_rewards(2, missing=0.2).double()
    expected = advantage(rewards)
    close(advantage(rewards + 3.5), expected, 1e-9)
    order = torch.randperm(rewards.shape[1], generator=torch.Generator().manual_seed(0))
    close(advantage(rewards[:, order]), expected[:, order], 1e-9)
    factor = 4.0 if name in ("mean_none", "leave_one_out") else 1.0
    # up to eps, which does not grow with the rewards
    close(advantage(rewards * 4), expected * factor, 2e-3 if factor == 1 else 1e-9)
    prompts = torch.randperm(rewards.shape[0], generator=torch.Generator().manual_seed(1))
    close(advantage(rewards[prompts]), expected[prompts], 1e-9)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_no_nan_whatever_is_missing(name):
    advantage = ADVANTAGES[name]
    one, none, two = [NAN, 2.0, NAN, NAN], [NAN] * 4, [NAN, 1.0, NAN, 0.0]
    advantages = advantage(rows(one, none, two))
    assert advantages.isfinite().all()
    assert torch.equal(advantages[:2], torch.zeros(2, 4, dtype=torch.float64))
    assert advantages[2, [0, 2]].eq(0).all() and advantages[2].ne(0).any()
    assert torch.equal(advantage(rows([5.0])), rows([0.0]))
    assert advantage(random_rewards(3, missing=0.8)).isfinite().all()
    # what is missing does not count: the same as the group without it
    full = advantage(rows([1.0, 0.0, 0.5]))
    close(advantage(rows([1.0, NAN, 0.0, 0.5, NAN]))[:, [0, 2, 3]], full, 1e-12)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_equal_rewards_have_no_advantage(name, value):
    assert torch.equal(ADVANTAGES[name](torch.full((3, 8), value)), torch.zeros(3, 8))


def test_a_tie_with_the_quantile_is_exactly_zero_even_where_the_mean_rounds():
    rewards = torch.full((3, 16), 10.1)
    assert 0 < group_mean_advantage(rewards).abs().max() < 0.01
    assert torch.equal(quantile_advantage(rewards), torch.zeros(3, 16))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_detached_and_at_least_fp32(name):
    rewards = random_rewards(4).requires_grad_()
    assert not ADVANTAGES[name](rewards).requires_grad
    assert ADVANTAGES[name](rewards.detach().bfloat16()).dtype == torch.float32
    assert ADVANTAGES[name](torch.tensor([[0, 1, 1]])).dtype == torch.float32


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.2, 4.0, NAN])
def test_impossible_quantiles_raise(quantile):
    with pytest.raises(ValueError, match=r"quantile is .*above 0 and below 1.*None takes the mean"):
        quantile_advantage(rows([0, 1]), quantile)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="scale is 'std'; allowed are group, batch, none"):
        group_mean_advantage(rows([0, 1]), scale="std")
    with pytest.raises(ValueError, match="interpolation is 'lower'; allowed are inverted_cdf, linear"):
        quantile_advantage(rows([0, 1]), interpolation="lower")
    with pytest.raises(ValueError, match="eps is 0; .*above 0"):
        group_mean_advantage(rows([0, 1]), eps=0)
    for function in (*ADVANTAGES.values(), lambda r: success_gate(r, 0.0)):
        with pytest.raises(ValueError, match=r"rewards has shape \(4,\); \(prompts, G\)"):
            function(torch.zeros(4))
        with pytest.raises(ValueError, match=r"rewards of prompt 1 are \[inf, 0.0\]; a reward must be finite, or NaN"):
            function(rows([0, 1], [math.inf, 0]))


@pytest.mark.parametrize(
    ("gamma", "last_gated"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8), (0.249, 1), (None, -1), (-0.1, -1), (-1, -1)]
)
def test_gate_of_eight_rollouts(gamma, last_gated):
    rewards = torch.cat([successes(count, 8) for count in range(9)])
    expected = [count <= last_gated for count in range(9)]
    assert success_gate(rewards, gamma).tolist() == expected
    assert success_gate(rewards.float().flip(1), gamma).tolist() == expected


def test_gate_compares_counts_not_floats():
    plain_errors = 0
    for size in (3, 7, 8, 10, 25, 50, 100):
        rewards = torch.cat([successes(count, size) for count in range(size + 1)])
        for percent in range(0, 101):
            limit = math.floor(Fraction(percent, 100) * size)
            assert success_gate(rewards, percent / 100).sum() == limit + 1
            plain_errors += math.floor(percent / 100 * size) != limit
    assert plain_errors > 0, "the plain floor would have been enough"


def test_gate_with_another_threshold_and_unscorable_answers():
    rewards = rows([0.2, 0.6, 0.7, NAN], [NAN] * 4, [0.2, NAN, NAN, NAN])
    # 2 of 3, 0 of 0, 0 of 1 at threshold 0.6
    assert success_gate(rewards, 0.0, 0.6).tolist() == [False, False, True]
    assert success_gate(rewards, 0.7, 0.6).tolist() == [True, False, True]
    assert success_gate(rewards, 0.5, 0.6).tolist() == [False, False, True]
    assert success_gate(rewards, 1.0, 0.6).tolist() == [True, True, True]
    assert success_gate(rewards, 0.0).tolist() == [True, False, True]


@pytest.mark.parametrize("gamma", [1.01, 8, NAN])
def test_impossible_gates_raise(gamma):
    with pytest.raises(ValueError, match=r"gamma is .*success rate in \[0, 1\]"):
        success_gate(rows([0, 1]), gamma)
    with pytest.raises(ValueError, match="success_threshold is nan"):
        success_gate(rows([0, 1]), 0.0, NAN)
