"""ALLoRA's factors (arXiv 2410.09692): of each row of a weight, by the norm of the change that B A has made to it.

All in float64: where rows of A are nearly parallel and B lies in the directions that they hardly have, r x r products
cancel, and fp32 is wrong by several percent. They are too small to cost anything.
"""

import torch
from torch import Tensor

from posttrain.checks import check_number
from posttrain.objectives.factors import check

# beyond these eta, factors would leave the range of half precision
LEAST_ETA, MOST_ETA = 1e-4, 1e4


@torch.no_grad()
def gram(A: Tensor) -> Tensor:
    """Compute A A^T in float64, (r, r) of A (r, d_in); detached."""
    A = A.detach().double()
    return A @ A.T


@torch.no_grad()
def row_norms(A: Tensor, B: Tensor) -> Tensor:
    """Compute the l2 norm of each row of B A, without forming it.

        ||(B A)_i||^2 = B_i (A A^T) B_i^T

    Rounding below zero counts as zero.

    Args:
        A: (r, d_in). B: (d_out, r).

    Returns:
        (d_out,) in float64, detached.
    """
    return _norms(gram(A), B)


@torch.no_grad()
def allora_scale(A: Tensor, B: Tensor, eta: float) -> Tensor:
    """Compute the factor by which ALLoRA multiplies each row of the gradient of B A.

        s_i = 1 / sqrt(||(B A)_i||_2 + 1 / eta^2)

    The norm itself is in it, not its square, and of a row of the product. A row that has not changed has eta, the
    largest value. Nothing is backpropagated through it.

    Args:
        A: (r, d_in). B: (d_out, r). eta: from 0.0001 to 10000.

    Returns:
        (d_out,) in float64, detached.

    Raises:
        ConfigError: another eta, or what are no two matrices of floating numbers with a product B A.
        DataError: numbers that are not finite.

    Source: arXiv 2410.09692, section 4.2.
    """
    check(A, B)
    eta = check_number("eta", eta, LEAST_ETA, MOST_ETA)
    return scale_of(gram(A), B, eta)


@torch.no_grad()
def scale_of(gram_of_A: Tensor, B: Tensor, eta: float) -> Tensor:
    """Compute `allora_scale` by A A^T (r, r) in the place of A."""
    return (_norms(gram_of_A, B) + eta**-2).rsqrt()


def _norms(gram_of_A: Tensor, B: Tensor) -> Tensor:
    B = B.detach().double()
    return ((B @ gram_of_A) * B).sum(dim=1).clamp(min=0).sqrt()
