"""Gradient agreement filtering (GAF): the mean of a step's micro-gradients that agree with each other.

With micro-gradients g_1, ..., g_M in order, S the sum and c the number of those accepted, at first S = g_1 and c = 1:
g_i is accepted where d(S / c, g_i) <= tau, with the cosine distance d(a, b) = 1 - <a, b> / (|a| |b|); then S += g_i and
c += 1. The step's gradient is S / c. Where c stays 1 of several nothing agrees, and no step is taken. One alone has no
other to disagree with, and is the step's gradient.

Micro-gradients of zero have no direction: they are neither accepted nor rejected, and count nowhere. One that is not
finite is accepted, so that it reaches whatever watches over the step's gradient; so is one that meets a sum of zero.

Source: arXiv 2412.18052, Algorithm 1. The code published with it halves instead: (mean + g_i) / 2, which weighs the
last micro-gradient as much as all before.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class AgreeingMean:
    """Takes a step's micro-gradients one after the other and keeps the sum of those that agree.

    Attributes:
        accepted: of the micro-gradients so far. compared: those that another had been accepted before; of these
        distances: the sum of their cosine distances to the mean of the accepted ones.
        count: micro-gradients so far that are not zero.
    """

    def __init__(self, tau: float) -> None:
        self.tau = tau
        self.accepted, self.count, self.compared, self.distances = 0, 0, 0, 0.0
        self.sum: list[Tensor | None] | None = None

    def add(self, gradients: Sequence[Tensor | None]) -> bool:
        """Accept a micro-gradient or not, and return which.

        Args:
            gradients: a tensor for each parameter, None where it has none; they are taken over, and may be changed.
        """
        square = inner(gradients, gradients)
        if square == 0:
            # zeros are kept: an optimizer treats a parameter of zero gradient otherwise than one that has none
            self._keep(gradients)
            return False
        self.count += 1
        total = inner(self.sum, self.sum) if self.accepted else 0.0
        # opposite gradients cancel at a limit of 2 alone, at which all are accepted
        if total != 0:
            # rounding may take the cosine below -1
            distance = min(1 - inner(self.sum, gradients) / (math.sqrt(total) * math.sqrt(square)), 2.0)
            self.compared += 1
            self.distances += distance
            # a distance that is no number is accepted
            if distance > self.tau:
                return False
        self.accepted += 1
        self._keep(gradients)
        return True

    def _keep(self, gradients: Sequence[Tensor | None]) -> None:
        if self.sum is None:
            self.sum = list(gradients)
        else:
            self.sum = [_added(one, other) for one, other in zip(self.sum, gradients, strict=True)]

    @property
    def agrees(self) -> bool:
        """Return whether two micro-gradients agree, or fewer than two have a direction; else no step is taken."""
        return self.accepted > 1 or self.count < 2

    @property
    def factor(self) -> float:
        """Return what makes of the sum a step's gradient where each micro-gradient is its share of one: M / c."""
        return self.count / self.accepted if self.accepted else 1.0


def inner(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
    """Compute the inner product of two gradients, in float64; a tensor that is missing is zero."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if not pairs:
        return 0.0
    return float(sum((_wide(a) * _wide(b)).sum(dtype=_sums(a)) for a, b in pairs))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _sums(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)
