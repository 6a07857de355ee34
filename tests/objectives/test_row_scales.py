"""Golden numbers of ALLoRA's factors, computed by hand; and norms that fp32 gets wrong."""

import pytest
import torch
from torch import tensor

from posttrain.errors import ConfigError, DataError
from posttrain.objectives.row_scales import allora_scale, row_norms

A = tensor([[1, -2, 0.5], [0, 1, 1]], dtype=torch.float64)
B = tensor([[0.3, -0.1], [0, 0.4]], dtype=torch.float64)


def golden(*values):
    return tensor(values, dtype=torch.float64)


def near(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_norms_are_of_rows_of_the_product():
    near(row_norms(A, B), golden(0.7632168761, 0.5656854249))


@pytest.mark.parametrize(
    ("eta", "expected"), [(1.0, (0.7530904374, 0.7991857760)), (2.0, (0.9934563559, 1.1072320513))]
)
def test_factors_are_the_golden_ones(eta, expected):
    near(allora_scale(A, B, eta), golden(*expected))


def test_wrong_norms_have_other_factors():
    product = B @ A
    for norms, expected in (
        (product.square().sum(dim=1), (1.0959932487, 1.3245323571)),
        (B.norm(dim=1), (1.3289370792, 1.2403473459)),
    ):
        wrong = (norms + 0.25).rsqrt()
        near(wrong, golden(*expected))
        assert ((wrong - allora_scale(A, B, 2.0)).abs() > 0.05).all()


def test_a_row_that_has_not_changed_has_eta_and_a_small_eta_is_the_same_for_all():
    near(allora_scale(A, torch.zeros_like(B), 2.0), golden(2.0, 2.0), atol=0)
    assert (allora_scale(A, 1e-30 * B, 1e-2) <= 1e-2).all()
    near(allora_scale(A, B, 1e-4) / 1e-4, golden(1.0, 1.0), atol=1e-8)


def test_nearly_parallel_rows_do_not_cancel():
    """B lies in the direction that A's rows hardly have: r x r products in fp32 are wrong by percents."""
    torch.manual_seed(0)
    one, other = torch.randn(2, 400)
    # equal fp32 numbers on both sides: what differs is how they are multiplied
    A = torch.stack([one, one + 1e-3 * other])
    B = tensor([[1.0, -1.0], [40.0, -40.0]])
    exact = (B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(row_norms(A, B), exact, atol=0, rtol=1e-8)
    single = ((B @ (A @ A.T)) * B).sum(dim=1).clamp(min=0).sqrt()
    assert ((single - exact).abs() / exact > 1e-2).any()


def test_rounding_below_zero_is_zero():
    # r x r products whose true norm is zero
    A = tensor([[0.1, 0.7, 1.3], [0.1, 0.7, 1.3]])
    B = tensor([[0.3, -0.3], [1e-9, -1e-9], [7.1, -7.1]])
    assert not row_norms(A, B).any() and (allora_scale(A, B, 2.0) == 2.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_are_float64_and_carry_no_gradient(dtype):
    matrices = A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_()
    found = allora_scale(*matrices, 2.0)
    assert found.dtype == torch.float64 and not found.requires_grad
    torch.testing.assert_close(found, allora_scale(A, B, 2.0), atol=0, rtol=0.01)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ((B, A, 2.0), ConfigError, "as many rows of A as columns of B"),
        ((A.numpy(), B.numpy(), 2.0), ConfigError, "A is ndarray; A .* are dense matrices of fp32"),
        ((A, B.to(torch.complex64), 2.0), ConfigError, "B is torch.complex64"),
        ((A.long(), B, 2.0), ConfigError, "A is torch.int64"),
        ((A[0], B, 2.0), ConfigError, "are dense matrices of fp32"),
        ((A, B * float("nan"), 2.0), DataError, "B holds numbers that are not finite"),
        ((A / 0, B, 2.0), DataError, "A holds numbers that are not finite"),
        *[((A, B, eta), ConfigError, "eta") for eta in (0, -1.0, float("nan"), float("inf"), "2", True, None, 1e-200)],
        ((A, B, 10**400), ConfigError, "eta is a number beyond"),
    ],
)
def test_what_has_no_factors_is_refused(given, kind, said):
    with pytest.raises(kind, match=said):
        allora_scale(*given)


def test_eta_of_another_library_is_a_number():
    near(allora_scale(A, B, torch.tensor([2.0]).numpy()[0]), golden(0.9934563559, 1.1072320513))
