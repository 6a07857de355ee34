"""Salient columns of a weight (GIFT-SW, arXiv 2408.15300), and the step of its rounding that gives noise its size."""

import math

import torch
from torch import Tensor

# alpha is sought among these shares of a row's largest weight
_SHARES = [1 - place / 100 for place in range(80)]
# weights that are rounded at a time: as many as a processor keeps at hand; an accelerator takes more
_BLOCK, _BLOCK_OF_ACCELERATOR = 1 << 18, 1 << 24


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


def column_errors(weight: Tensor, bits: int, norm: float = 2.0) -> Tensor:
    """Return the norm (N,) of what rounding leaves of each column of a weight (O, N)."""
    step = (row_scales(weight, bits)[0] / (2 ** (bits - 1) - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.linalg.vector_norm(weight - _rounded(weight, step[:, None], bits), ord=norm, dim=0)


def salient(weight: Tensor, inputs: Tensor, count: int, bits: int, norm: float = 2.0, power: float = 1.0) -> Tensor:
    """Return the numbers, in order, of the `count` columns of the greatest sensitivity ||W_j - Q(W_j)|| ||X_j||^power.

    Args:
        weight: (O, N). inputs: (N,), the norm of each input feature over the tokens of calibration.
        norm: of what rounding leaves of a column; 0 for none of it, so that the inputs alone decide.
    """
    scores = inputs.to(weight.dtype) ** power
    if norm:
        scores = scores * column_errors(weight, bits, norm)
    # of equal ones the first
    return scores.sort(descending=True, stable=True).indices[:count].sort().values
