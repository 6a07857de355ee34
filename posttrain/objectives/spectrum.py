"""What is told of a product B A, and of a truncation of it, by its singular values alone."""

import math

import torch
from torch import Tensor

from posttrain.objectives.factors import check, check_finite, check_seen, core, finite, norm


def singular_values(A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return the singular values of scale B A, the largest first, min(r, d_in, d_out) of them, in fp64.

    Raises:
        ConfigError: shapes that do not fit, or a scale that is no finite number.
        DataError: numbers that are not finite, or whose product is beyond fp64 or below it.
    """
    check(A, B)
    check_finite("scale", scale)
    values = torch.linalg.svdvals(core(A.detach().double(), B.detach().double())[2])
    scaled = finite(values * abs(float(scale)))
    if scale:
        check_seen(scaled[0].item(), values)
    return scaled


def product_norm(A: Tensor, B: Tensor) -> float:
    """Return ||B A|| in the Frobenius norm; accurate also where much of it cancels."""
    return norm(core(A, B)[2])


def kept_rank(values: Tensor, rank: int | None = None, energy: float | None = None) -> int:
    """Return how many of the singular values (K,), the largest first, a rank or an energy keeps; 1 at the least."""
    kept = len(values)
    if energy is not None:
        values = values.double()
        # squares of the values themselves may be beyond fp64, or vanish
        sums = (values / values[0] if values[0] else values).square().cumsum(0)
        # of a float that is one rounding short of the whole sum there is no more to add
        kept = min(int((sums < energy * sums[-1]).sum()) + 1, kept)
    return max(min(kept, rank or kept), 1)


def effective_rank(values: Tensor) -> float:
    """Return exp(entropy of s_i / sum s): the rank that equally large singular values would have; 0 for none.

    Source: Roy and Vetterli, The effective rank (EUSIPCO 2007).
    """
    shares = values.double()[values > 0]
    if not len(shares):
        return 0.0
    # of sizes that may add up to more than fp64 holds
    shares = shares / shares.max()
    shares = shares / shares.sum()
    return math.exp(-(shares * shares.log()).sum().item())
