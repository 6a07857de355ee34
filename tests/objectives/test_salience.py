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


WIDE = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
INPUTS = torch.randn(40, 24, generator=torch.Generator().manual_seed(2)).abs()


def by_hand(norm, power, count=6):
    """The columns by exact fractions of logarithms, of another form than the library's."""
    errors = (WIDE - salience._rounded(WIDE, (salience.row_scales(WIDE, 4)[0] / 7)[:, None], 4)).abs().double()
    top = errors.amax(0)
    norms = top.log() if norm == math.inf else top.log() + ((errors / top).log() * norm).exp().sum(0).log() / norm
    scores = norms + power * INPUTS.amax(0).double().log()
    return sorted(scores.argsort(descending=True)[:count].tolist())


# every norm at the power of the method and at a large one, and the corners of the others
@pytest.mark.core("1.0-", "1000.0-", "0.0-inf", "0.0-1.0", "1e+30-inf", "1e+30-1e+30")
@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0, 4.0, 20.0, 60.0, 1000.0, 1e30, math.inf])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 100.0, 1000.0, 1e30])
def test_columns_are_the_exponents_own_however_far_their_powers_go(norm, power):
    for scale in (1e-18, 1.0, 1e18):
        found = salience.salient(WIDE * scale, INPUTS.amax(0) * scale, 6, 4, norm, power)
        assert found.tolist() == by_hand(norm, power) != list(range(6))


@pytest.mark.parametrize(
    ("norm", "power"), [(1.0, 1.0), (2.0, 1.0), (2.0, 0.5), (3.0, 2.0), (math.inf, 1.0), (0.0, 1.0)]
)
def test_ordinary_exponents_order_columns_as_their_plain_product_does(norm, power):
    scores = INPUTS.amax(0) ** power
    if norm:
        step = (salience.row_scales(WIDE, 4)[0] / 7)[:, None]
        scores = scores * torch.linalg.vector_norm(WIDE - salience._rounded(WIDE, step, 4), ord=norm, dim=0)
    order = salience.sensitivity(WIDE, INPUTS.amax(0), 4, norm, power).sort(descending=True, stable=True).indices
    assert torch.equal(order, scores.sort(descending=True, stable=True).indices)


@pytest.mark.parametrize("norm", [1.0, 2.0, 50.0, 200.0, 1e4, 1e30, math.inf])
def test_norms_of_features_are_those_of_all_tokens_at_once(norm):
    for scale in (1e-30, 1.0, 1e30):
        values, found = INPUTS.double() * scale, salience.FeatureNorm(norm)
        values[:, 3] = 0
        assert found.value() is None
        for part in values.split([1, 30, 9]):
            found.add(-part)
        top = values.amax(0).clamp(min=1e-300)
        expected = top if norm == math.inf else top * (values / top).pow(norm).sum(0).pow(1 / norm)
        torch.testing.assert_close(found.value(), expected * (values.amax(0) > 0), rtol=1e-12, atol=1e-290)
    plain, whole = salience.FeatureNorm(2.0), INPUTS.double()
    for part in whole.split(7):
        plain.add(part)
    assert torch.equal(plain.value(), sum(part.pow(2).sum(0) for part in whole.split(7)).pow(0.5))


def test_columns_without_inputs_or_errors_are_told():
    assert (salience.sensitivity(WIDE, torch.zeros(24), 4) == -math.inf).all()
    assert (salience.sensitivity(torch.ones(3, 24), INPUTS[0], 4) == -math.inf).all()
    assert salience.sensitivity(WIDE, INPUTS[0], 4).isfinite().all()
