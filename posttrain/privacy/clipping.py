"""Bounds on what one unit of privacy adds to a step: coefficients, and the sums that they weigh."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# added to a norm by `automatic`, as its authors do
_STABLE = 0.01


def coefficients(norms: Tensor, clip_norm: float, clipping: str = "flat") -> Tensor:
    """Return what gradients of these norms are multiplied by, so that none is longer than `clip_norm`.

    flat: min(1, C / norm); automatic: C / (norm + 0.01), which makes short gradients longer as well.

    Args:
        norms: (N,), over all trained values. clip_norm: C, above 0; inf clips nothing and is for flat alone.
        clipping: flat or automatic.

    Returns:
        (N,); 0 for a norm that is not finite. No gradient flows through it.

    Source: arXiv 1607.00133, algorithm 1; 2206.07136, section 4 (automatic).
    """
    norms = norms.detach()
    # of a norm of 0 it is infinite, which is cut to 1
    found = clip_norm / (norms + _STABLE) if clipping == "automatic" else (clip_norm / norms).clamp(max=1.0)
    if math.isinf(clip_norm):
        found = torch.ones_like(norms)
    return torch.where(torch.isfinite(norms), found, 0.0)


def square_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the square norm of each row's gradient over all tensors, (N,) in fp32.

    Args:
        gradients: (N, ...) in fp32, by name; one at least.
    """
    parts = [torch.linalg.vector_norm(rows.flatten(1), dim=1) for rows in gradients.values()]
    return torch.stack(parts).square_().sum(dim=0)


def without_bad_rows(gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Put zero in the place of the gradients of rows that are not finite; a coefficient of 0 would not: 0 inf is NaN.

    Args:
        gradients: (N, ...) in fp32, by name; changed in place.

    Returns:
        the square norms (N,), and which rows (N,) were replaced. A finite gradient whose square norm overflows is as
        well.
    """
    squares = square_norms(gradients)
    bad = ~torch.isfinite(squares)
    # whether there are any is not asked, which would wait for the device
    for rows in gradients.values():
        rows.masked_fill_(bad.view(-1, *[1] * (rows.dim() - 1)), 0.0)
    return squares.masked_fill_(bad, 0.0), bad


def add_weighted(total: Tensor, rows: Tensor, weights: Tensor) -> None:
    """Add sum_j w_j g_j to a sum in place.

    Args:
        total: (P,) fp32. rows: (N, ...) of P values each, fp32. weights: (N,) fp32.
    """
    total.addmv_(rows.flatten(1).T, weights)
