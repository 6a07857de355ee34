"""Bounds on units: golden coefficients and sums, both kinds of clipping, gradients that are no numbers."""

import math

import pytest
import torch

from posttrain.privacy import clipping

GRADIENTS = torch.tensor([[[3.0, -2], [-1, 2]], [[1.5, 1.5], [4, 0]]])


def summed(rows, weights):
    total = torch.zeros(rows[0].numel())
    clipping.add_weighted(total, rows, weights)
    return total.view_as(rows[0])


def test_coefficients_and_their_sum_are_the_golden_ones():
    norms = clipping.square_norms({"B": GRADIENTS}).sqrt()
    torch.testing.assert_close(norms, torch.tensor([4.242640687, 4.527692569]))
    weights = clipping.coefficients(norms, 2.0)
    torch.testing.assert_close(weights, torch.tensor([0.4714045208, 0.4417261043]))
    expected = torch.tensor([[2.0768027188, -0.2802198851], [1.2954998964, 0.9428090416]])
    torch.testing.assert_close(summed(GRADIENTS, weights), expected)
    torch.testing.assert_close(
        summed(GRADIENTS, weights) / 2, torch.tensor([[1.0384013594, -0.1401099426], [0.6477499482, 0.4714045208]])
    )


def test_a_reduction_of_four_rows_is_the_golden_one():
    rows = torch.tensor([[3.0, 4], [0.3, 0.4], [0, 2], [-1, 0]])
    weights = clipping.coefficients(clipping.square_norms({"w": rows}).sqrt(), 1.0)
    torch.testing.assert_close(summed(rows, weights), torch.tensor([-0.1, 2.2]))


@pytest.mark.parametrize("kind", ["flat", "automatic"])
def test_no_gradient_is_longer_than_the_clipping_norm(kind):
    norms = torch.tensor([0.0, 1e-30, 1e-3, 0.5, 1.0, 7.0, 1e18])
    weights = clipping.coefficients(norms, 0.7, kind)
    assert ((weights * norms) <= 0.7 * (1 + 1e-6)).all() and torch.isfinite(weights).all()
    if kind == "flat":
        assert weights[:4].tolist() == [1, 1, 1, 1]
    else:
        torch.testing.assert_close(weights[3], torch.tensor(0.7 / 0.51))


def test_a_norm_that_is_no_number_has_weight_zero_and_an_infinite_bound_clips_nothing():
    norms = torch.tensor([math.nan, math.inf, 2.0])
    for kind in ("flat", "automatic"):
        weights = clipping.coefficients(norms, 1.0, kind)
        assert weights[:2].tolist() == [0, 0] and weights[2] > 0
    assert clipping.coefficients(norms, math.inf).tolist() == [0, 0, 1]
    assert not clipping.coefficients(norms.requires_grad_(), 1.0).requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_row_that_is_not_finite_counts_as_zero_in_every_tensor(value):
    gradients = {"A": torch.ones(3, 2, 2), "B": torch.ones(3, 4)}
    gradients["B"][1, 2] = value
    squares, bad = clipping.without_bad_rows(gradients)
    assert bad.tolist() == [False, True, False] and squares.tolist() == [8, 0, 8]
    for rows in gradients.values():
        assert rows[1].eq(0).all() and rows[::2].eq(1).all()


def test_norms_are_those_over_all_tensors():
    torch.manual_seed(0)
    gradients = {"A": torch.randn(5, 3, 4), "B": torch.randn(5, 7)}
    whole = torch.cat([rows.flatten(1) for rows in gradients.values()], dim=1)
    torch.testing.assert_close(clipping.square_norms(gradients), whole.square().sum(1))
