"""GAF on gradients of a few numbers: the golden example, and a rule that is sequential."""

import math

import pytest
import torch

from posttrain.mechanisms.gradient_agreement import AgreeingMean, inner

# d(a, b) = 1 - 5 / (sqrt(6) sqrt(5)) is small; c points elsewhere
A, B, C = (1.0, 2.0, -1.0), (2.0, 1.0, 0.0), (-1.0, 0.5, 2.0)


def split(values):
    """A gradient of two parameters."""
    return [torch.tensor(values[:1]), torch.tensor(values[1:])]


def taken(tau, *gradients):
    mean = AgreeingMean(tau)
    return mean, [mean.add(split(gradient)) for gradient in gradients]


def whole(mean):
    return torch.cat(mean.sum) / mean.accepted


def test_the_golden_example():
    mean, accepted = taken(0.97, A, B, C)
    assert accepted == [True, True, False] and (mean.accepted, mean.count, mean.compared) == (2, 3, 2)
    assert whole(mean).tolist() == [1.5, 1.5, -0.5]
    assert mean.distances == pytest.approx(0.26970326 + 1.35043832, abs=1e-8)
    assert taken(0.97, A, C)[0].distances == pytest.approx(1.35634832, abs=1e-7)
    assert mean.factor == 1.5


@pytest.mark.parametrize(("tau", "accepted"), [(1.3504, 2), (1.3505, 3), (0.26, 1), (2.0, 3)])
def test_a_gradient_is_accepted_up_to_the_distance(tau, accepted):
    assert taken(tau, A, B, C)[0].accepted == accepted


def test_it_is_the_mean_of_all_that_were_accepted_and_not_of_the_last_two():
    mean, _ = taken(2.0, A, B, C)
    torch.testing.assert_close(whole(mean), torch.tensor([A, B, C]).mean(dim=0))
    # as the published code has it: ((a + b) / 2 + c) / 2
    halved = (torch.tensor([A, B]).mean(dim=0) + torch.tensor(C)) / 2
    assert not torch.allclose(whole(mean), halved)


def test_the_order_plays_a_part():
    assert taken(0.97, A, B, C)[0].accepted == 2
    assert taken(0.97, C, A, B)[0].accepted == 1
    assert not taken(0.97, C, A, B)[0].agrees and taken(0.97, A, B, C)[0].agrees


def test_the_sum_of_all_is_made_as_autograd_adds_them():
    gradients = [torch.randn(5, generator=torch.Generator().manual_seed(number)) for number in range(4)]
    mean, sum_ = AgreeingMean(2.0), gradients[0].clone()
    for gradient in gradients:
        mean.add([gradient.clone()])
    for gradient in gradients[1:]:
        sum_ += gradient
    assert torch.equal(mean.sum[0], sum_) and mean.factor == 1


def test_a_gradient_of_zero_counts_nowhere():
    mean, accepted = taken(0.97, (0.0, 0.0, 0.0), A, (0.0, 0.0, 0.0), B)
    assert accepted == [False, True, False, True] and (mean.count, mean.factor) == (2, 1.0)
    assert not taken(0.97, (0.0, 0.0, 0.0), A, C)[0].agrees


@pytest.mark.parametrize("others", [(), ((0.0, 0.0, 0.0),)])
@pytest.mark.parametrize("one", [A, (0.0, 0.0, 0.0)])
def test_one_alone_is_the_step(one, others):
    mean, _ = taken(0.97, *others, one)
    assert mean.agrees and mean.factor == 1 and torch.cat(mean.sum).tolist() == list(one)


@pytest.mark.parametrize("seed", range(8))
def test_two_accepts_opposite_gradients_and_what_comes_after_their_sum_of_zero(seed):
    one = torch.randn(7, generator=torch.Generator().manual_seed(seed))
    mean = AgreeingMean(2.0)
    assert [mean.add([gradient.clone()]) for gradient in (one, -one, 3 * one)] == [True] * 3
    assert mean.factor == 1 and mean.compared == 1 and mean.distances == pytest.approx(2)
    assert torch.equal(mean.sum[0], 3 * one)


def test_zeros_keep_a_parameter_that_the_others_do_not_reach():
    mean = AgreeingMean(1.0)
    mean.add([torch.zeros(2), torch.zeros(1)])
    mean.add([torch.tensor([1.0, 2.0]), None])
    assert mean.sum[1].tolist() == [0.0] and mean.sum[0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_accepted_so_that_it_is_seen(value):
    mean, accepted = taken(0.97, A, (value, 0.0, 1.0))
    assert accepted == [True, True] and not torch.cat(mean.sum).isfinite().all()


def test_a_parameter_without_a_gradient_is_zero():
    mean = AgreeingMean(1.0)
    mean.add([torch.tensor([1.0, 2.0]), None])
    mean.add([torch.tensor([2.0, 1.0]), torch.tensor([3.0])])
    assert mean.sum[1].tolist() == [3.0] and mean.distances == pytest.approx(1 - 4 / math.sqrt(5 * 14))
    assert inner([None], [torch.ones(2)]) == 0


def test_the_inner_product_is_summed_in_float64():
    gradient = [torch.full((1 << 20,), 1e-4), torch.ones(1)]
    assert inner(gradient, gradient) == pytest.approx(1 + 1e-8 * (1 << 20), rel=1e-6)
    half = [value.bfloat16() for value in gradient]
    assert inner(half, half) == pytest.approx(inner(gradient, gradient), rel=1e-2)
