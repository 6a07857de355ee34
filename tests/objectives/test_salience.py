"""Golden numbers of GIFT-SW's columns and steps, computed by hand-written code of another form."""

import math

import pytest
import torch

from posttrain.objectives import salience

W = torch.tensor(
    [[0.5, -0.2, 0.1, 0.8, -0.05, 0.3], [-0.4, 0.6, 0.2, -0.1, 0.7, 0.15]],
    dtype=torch.float64,
)
X = torch.tensor(
    [[1, 0.2, -0.5, 0.1, 3, 0.4], [0.5, -0.1, 0.6, -0.2, -2, 0.3], [-0.2, 0.4, 0.1, 0.3, 1, -0.9]],
    dtype=torch.float64,
)


def test_scales_and_column_errors_are_the_golden_ones():
    alpha, error = salience.row_scales(W, 4)
    torch.testing.assert_close(alpha, alpha.new_tensor([0.752, 0.693]), atol=1e-9, rtol=0)
    torch.testing.assert_close(error, error.new_tensor([0.0069561633, 0.00241]), atol=1e-9, rtol=0)
    golden = [0.0373576209, 0.0160229427, 0.0076930926, 0.0480104155, 0.0504876222, 0.0529211967]
    torch.testing.assert_close(salience.column_errors(W, 4), W.new_tensor(golden), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("norms", "columns"),
    [
        (dict(inputs=X.abs().amax(0)), [4, 5]),
        (dict(inputs=X.norm(dim=0), norm=math.inf, power=0.5), [4, 5]),
        # as the published code has it
        (dict(inputs=X.abs().amax(0), norm=0.0), [0, 4]),
    ],
    ids=["2-inf-1", "inf-2-0.5", "activation"],
)
def test_salient_columns_are_the_golden_ones(norms, columns):
    assert salience.salient(W, count=2, bits=4, **norms).tolist() == columns


def test_a_rows_step_is_that_of_its_other_columns():
    step = salience.steps(W, torch.tensor([4, 5]), 4)
    torch.testing.assert_close(step, W.new_tensor([0.1142857143, 0.0848571429]), atol=1e-9, rtol=0)


def test_no_scale_on_the_grid_leaves_less_than_the_one_found():
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, error = salience.row_scales(weight, 3)
    for share in range(80):
        tried = weight.abs().amax(1) * (1 - share / 100)
        rounded = torch.clamp(torch.round(weight / (tried / 3)[:, None]), -4, 3) * (tried / 3)[:, None]
        assert (((weight - rounded) ** 2).sum(1) >= error - 1e-12).all()
    assert (alpha < weight.abs().amax(1)).any()


def test_rows_of_zeros_have_no_step_and_no_error():
    weight = torch.cat([torch.zeros(1, 6), W.float()])
    assert salience.steps(weight, torch.tensor([4]), 4)[0] == 0
    assert salience.column_errors(weight, 4).isfinite().all()


def test_of_equal_columns_the_first_are_taken():
    assert salience.salient(torch.ones(3, 8), torch.ones(8), 3, 4).tolist() == [0, 1, 2]
