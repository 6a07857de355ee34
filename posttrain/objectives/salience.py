"""Salient columns of a weight (GIFT-SW, arXiv 2408.15300), and the step of its rounding that gives noise its size."""

import math

import torch
from torch import Tensor

# alpha is sought among these shares of a row's largest weight
_SHARES = [1 - place / 100 for place in range(80)]
# weights that are rounded at a time: as many as a processor keeps at hand; an accelerator takes more
_BLOCK, _BLOCK_OF_ACCELERATOR = 1 << 18, 1 << 24
# up to this norm the powers of what is scaled by a power of two stay in range
_EXACT = 64


def _rounded(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return (weight / step).round_().clamp_(least, most).mul_(step)


def row_scales(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return alpha (O,), the scale of each row's rounding that leaves the least squared error, and that error (O,).

    Rounded is W / delta, to whole numbers from -2^(bits - 1) to 2^(bits - 1) - 1, with delta = alpha / (2^(bits - 1) -
    1). Alpha is sought on the grid p max |W_i|, p = 1, 0.99, ... 0.21, each p of the whole row's largest weight.

    Args:
        weight: (O, N), in fp32 or wider. bits: 2 or more.
    """
    most, scales, errors = 2 ** (bits - 1) - 1, [], []
    block = _BLOCK if weight.device.type == "cpu" else _BLOCK_OF_ACCELERATOR
    rows = max(block // max(weight.size(1), 1), 1)
    for block in weight.split(rows):
        top = block.abs().amax(dim=1, keepdim=True)
        alpha, least = top.clone(), torch.full_like(top, math.inf)
        tiny = torch.finfo(block.dtype).tiny
        for share in _SHARES:
            tried = top * share
            error = (_rounded(block, (tried / most).clamp(min=tiny), bits) - block).square_().sum(dim=1, keepdim=True)
            is_better = error < least
            alpha, least = torch.where(is_better, tried, alpha), torch.where(is_better, error, least)
        scales.append(alpha[:, 0])
        errors.append(least[:, 0])
    return torch.cat(scales), torch.cat(errors)


def steps(weight: Tensor, columns: Tensor, bits: int) -> Tensor:
    """Return delta (O,), the step of the rounding of each row without its salient columns.

    Args:
        weight: (O, N). columns: (K,), numbers of columns that are left out. bits: 2 or more.
    """
    rest = torch.ones(weight.size(1), dtype=torch.bool, device=weight.device)
    rest[columns] = False
    return row_scales(weight[:, rest], bits)[0] / (2 ** (bits - 1) - 1)


class FeatureNorm:
    """The norm of each feature over tokens that come in parts, whatever the powers of its values are.

    Args:
        norm: 1 or more, or inf.
    """

    def __init__(self, norm: float) -> None:
        self.norm = norm
        # the norm is the first times the root of the second
        self._scale: Tensor | None = None
        self._sum: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Add the values (T, N) of T tokens, 1 or more."""
        values = values.double().abs()
        scale = values.amax(dim=0)
        if self.norm != math.inf:
            if self.norm <= _EXACT:
                # by a power of two, which rounds nothing
                scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent)
            scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
        before, self._scale = self._scale, scale if self._scale is None else torch.maximum(self._scale, scale)
        if self.norm == math.inf:
            return
        own = (values / self._scale).pow(self.norm).sum(dim=0)
        self._sum = own if before is None else self._sum * (before / self._scale).pow(self.norm) + own

    def value(self) -> Tensor | None:
        """Return the norms (N,) in fp64; None of no token."""
        if self._sum is None:
            return self._scale
        return self._scale * self._sum.pow(1 / self.norm)


def power_norm(values: Tensor, norm: float) -> Tensor:
    """Return the norm (N,) of the columns of values (O, N), also where their powers leave the range of its dtype."""
    found = torch.linalg.vector_norm(values, ord=norm, dim=0)
    top = values.abs().amax(dim=0)
    if norm == math.inf or _is_within(norm * top[top > 0].double().log(), values.dtype, len(values)):
        return found
    # the largest value of a column apart from a sum of 1 to O
    shares = values.abs().double() / top.double().clamp(min=torch.finfo(torch.float64).tiny)
    return top.double() * shares.pow(norm).sum(dim=0).clamp(min=1.0).pow(1 / norm)


def _is_within(logs: Tensor, dtype: torch.dtype, count: int = 1) -> bool:
    """Return whether numbers of these logarithms, and sums of `count` of them, are normal ones of a dtype."""
    limits = torch.finfo(dtype)
    low, high = math.log(limits.tiny), math.log(limits.max) - math.log(max(count, 1))
    return bool(((logs > low) & (logs < high)).all())


def column_errors(weight: Tensor, bits: int, norm: float = 2.0) -> Tensor:
    """Return the norm (N,) of what rounding leaves of each column of a weight (O, N).

    In its dtype, or in fp64 where the powers leave its range.
    """
    step = (row_scales(weight, bits)[0] / (2 ** (bits - 1) - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
    return power_norm(weight - _rounded(weight, step[:, None], bits), norm)


def sensitivity(weight: Tensor, inputs: Tensor, bits: int, norm: float = 2.0, power: float = 1.0) -> Tensor:
    """Return the logarithm (N,) of each column's sensitivity ||W_j - Q(W_j)|| ||X_j||^power, in fp64.

    It is -inf where the sensitivity is 0. Arguments are those of `salient`.
    """
    errors = column_errors(weight, bits, norm) if norm else torch.ones_like(inputs, dtype=weight.dtype)
    # 0 to the power of 0 is 1
    parts = torch.xlogy(torch.full_like(inputs, power, dtype=torch.float64), inputs.double()), errors.double().log()
    logs = parts[0] + parts[1]
    if errors.dtype == weight.dtype and all(
        _is_within(part[part > -math.inf], weight.dtype) for part in (*parts, logs)
    ):
        # of products in the weight's dtype as many are equal as it cannot tell apart
        scores = inputs.to(weight.dtype) ** power
        return (scores * errors if norm else scores).double().log()
    return logs


def salient(weight: Tensor, inputs: Tensor, count: int, bits: int, norm: float = 2.0, power: float = 1.0) -> Tensor:
    """Return the numbers, in order, of the `count` columns of the greatest sensitivity ||W_j - Q(W_j)|| ||X_j||^power.

    Args:
        weight: (O, N). inputs: (N,), the norm of each input feature over the tokens of calibration.
        norm: of what rounding leaves of a column; 0 for none of it, so that the inputs alone decide.
        power: finite, 0 or more.
    """
    return largest(sensitivity(weight, inputs, bits, norm, power), count)


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the numbers, in order, of the `count` largest of scores (N,); of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values
