"""Sharpness-aware minimisation (SAM): where the loss is highest near the weights, to first order.

    e = rho * g / |g|

with g the gradient of the whole optimiser step and |g| its norm over all trained weights. The step's update is the
gradient at w + e, taken from w. With a mask (FSAM) e is kept at the share of weights of the largest Fisher information,
and is 0 elsewhere: e = rho * (g / |g|) * m. The Fisher information is estimated by the squares of the same gradient.

Source: arXiv 2010.01412, equation 2; the mask arXiv 2210.05497.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.mechanisms.gradient_agreement import inner


def ascent(gradients: Sequence[Tensor | None], rho: float, share: float | None = None) -> tuple[list, float]:
    """Compute the perturbation of SAM, or of FSAM.

    Args:
        gradients: a tensor for each parameter, None where it has none; they are changed into the perturbation.
        rho: its norm, before a mask. share: of the weights that it moves, in (0, 1]; None for all of them.

    Returns:
        the perturbation, a tensor for each parameter or None, and the norm |g| of the gradient. Without a gradient, or
        with one that is not finite, nothing is perturbed: all are None.
    """
    norm = math.sqrt(inner(gradients, gradients))
    if norm == 0 or not math.isfinite(norm):
        return [None] * len(gradients), norm
    least = None if share is None else _least(gradients, share)
    made = []
    for gradient in gradients:
        if gradient is None:
            made.append(None)
            continue
        if least is not None:
            gradient.masked_fill_(gradient.abs() < least, 0.0)
        made.append(gradient.mul_(rho / norm))
    return made, norm


def _least(gradients: Sequence[Tensor | None], share: float) -> Tensor:
    """Return the size of a gradient's number from which on it is among the largest `share`; ties are all kept."""
    sizes = torch.cat([gradient.abs().flatten() for gradient in gradients if gradient is not None])
    kept = max(1, math.ceil(share * sizes.numel()))
    return sizes.kthvalue(sizes.numel() - kept + 1).values


class Perturbed:
    """Holds weights that were moved, so that they can be put back bit for bit."""

    def __init__(self, parameters: Sequence[Tensor], perturbation: Sequence[Tensor | None]) -> None:
        """Move the parameters."""
        moved = [(p, e) for p, e in zip(parameters, perturbation, strict=True) if e is not None]
        self._before = [(parameter, parameter.detach().clone()) for parameter, _ in moved]
        with torch.no_grad():
            for parameter, step in moved:
                parameter.add_(step)

    def put_back(self) -> None:
        """Put the weights back; a second call does nothing."""
        with torch.no_grad():
            for parameter, before in self._before:
                parameter.copy_(before)
        self._before = []
