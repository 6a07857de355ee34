"""Gradients of the scaled product against the dense weight's, in shapes of any kind, under autocast, and wrong ones."""

import pytest
import torch
import torch.nn.functional as F

from posttrain.mechanisms import scaled_rows as halves
from posttrain.objectives.row_scales import allora_scale

A = torch.tensor([[1, -2, 0.5], [0, 1, 1]], dtype=torch.float64)
B = torch.tensor([[0.3, -0.1], [0, 0.4]], dtype=torch.float64)
X = torch.tensor([[1, 2, -1], [0.5, -1, 3]], dtype=torch.float64)
DELTA = torch.tensor([[1, -2], [0.5, 1]], dtype=torch.float64)
GOLDEN = {
    1.0: (
        [[0.2824089140, 0.3388906968, 0.1129635656], [-0.5736477702, -1.7113351175, 1.5607170300]],
        [[-1.1296356561, 1.5061808748], [8.7910435355, 0]],
    ),
    2.0: (
        [[0.3725461334, 0.4470553601, 0.1490184534], [-0.7885212753, -2.3634825559, 2.1647912847]],
        [[-1.4901845338, 1.9869127117], [12.1795525639, 0]],
    ),
}


def scaled_rows(x, A, B, eta):
    """Of matrices, which are the leaves."""
    down, up = (torch.nn.Linear(*matrix.T.shape, bias=False) for matrix in (A, B))
    halves.become_scaled(down, up)
    for layer, matrix in ((down, A), (up, B)):
        del layer.weight
        layer.weight = matrix
    return halves.scaled_rows(x, down, up, eta)


def gradients(made, *leaves, delta=None):
    delta = torch.ones_like(made) if delta is None else delta
    return torch.autograd.grad(made, leaves, delta)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("eta", GOLDEN)
def test_gradients_are_the_golden_ones(eta):
    x, a, b = leaves(X, A, B)
    found = gradients(scaled_rows(x, a, b, eta), a, b, x, delta=DELTA)
    of_x = [[0.3, -1.5, -0.75], [0.15, 0.05, 0.425]]
    for ours, expected in zip(found, (*GOLDEN[eta], of_x), strict=True):
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 2, 5), (0, 5)])
def test_any_leading_shape_has_the_gradients_of_the_dense_weight(shape):
    torch.manual_seed(0)
    x, a, b = (torch.randn(size, dtype=torch.float64) for size in (shape, (3, 5), (4, 3)))
    x, a, b = leaves(x, a, b)
    made = scaled_rows(x, a, b, 2.0)
    delta = torch.randn_like(made)
    # g = dL/d(BA), rows scaled
    dense = (b @ a).detach().requires_grad_()
    (g,) = gradients(F.linear(x.detach(), dense), dense, delta=delta)
    g = allora_scale(a, b, 2.0)[:, None] * g
    assert made.shape == (*shape[:-1], 4)
    expected = (b.T @ g, g @ a.T, delta @ (b @ a))
    for ours, theirs in zip(gradients(made, a, b, x, delta=delta), expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-12, rtol=1e-12)


def test_only_what_needs_a_gradient_gets_one():
    for place in range(3):
        tensors = [tensor.clone() for tensor in (X, A, B)]
        tensors[place].requires_grad_()
        found = gradients(scaled_rows(*tensors, 2.0), tensors[place])
        whole = leaves(X, A, B)
        assert torch.equal(found[0], gradients(scaled_rows(*whole, 2.0), whole[place])[0])
    assert not scaled_rows(X, A, B, 2.0).requires_grad


def test_the_norm_is_not_differentiated_through():
    x, a, b = leaves(X, A, B)
    (first,) = torch.autograd.grad(scaled_rows(x, a, b, 2.0).square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_lora(within, dtype):
    """In bf16, forward bit for bit, and gradients in the leaves' own dtypes; whether or not backward is within it."""
    torch.manual_seed(0)
    x, a, b = torch.randn(2, 7, 24, dtype=dtype), torch.randn(3, 24), torch.randn(16, 3)
    (x1, a1, b1), (x2, a2, b2) = leaves(x, a, b), leaves(x, a, b)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = scaled_rows(x1, a1, b1, 2.0), F.linear(F.linear(x2, a2), b2)
        delta = torch.randn_like(ours)
        found = gradients(ours, a1, b1, x1, delta=delta) if within else None
    if not within:
        found = gradients(ours, a1, b1, x1, delta=delta)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    of_a, of_b, of_x = gradients(theirs, a2, b2, x2, delta=delta)
    assert [one.dtype for one in found] == [torch.float32, torch.float32, dtype]
    scale = allora_scale(a, b, 2.0).float()
    torch.testing.assert_close(found[1], scale[:, None] * of_b, atol=0.02, rtol=0.02)
    torch.testing.assert_close(found[2], of_x, atol=0.1, rtol=0.02)
    g = delta.flatten(0, 1).float().T @ x.flatten(0, 1).float()
    exact = b.T @ (scale[:, None] * g)
    assert (found[0] - exact).norm() < 0.01 * exact.norm() < 0.1 * (of_a - exact).norm()
