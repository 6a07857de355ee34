"""What two factors A and B of a product B A may be, and the numerics that all algebra of them stands on.

Sizes are told from the factors alone: A^T = Qa Ra and B = Qb Rb give the small matrix Rb Ra^T, which has the singular
values of B A.
"""

import math

import torch
from torch import Tensor

from posttrain.checks import check_holdable, plain
from posttrain.errors import ConfigError, DataError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# of entries that are equally large but for rounding, the first one decides a row's sign
_TIE = 1000
# of a type's rounding, the most that storing a factor may lose: more is an underflow
_LOST = 32
# below it, numbers of fp64 have fewer and fewer digits
_LEAST = torch.finfo(torch.float64).tiny / torch.finfo(torch.float64).eps


def check(A: Tensor, B: Tensor) -> None:
    """Raise ConfigError where A (r, d_in) and B (d_out, r) make no product, DataError where they are not finite."""
    for name, value in (("A", A), ("B", B)):
        if not isinstance(value, Tensor) or value.dim() != 2 or not _is_usable(value) or not value.numel():
            shown = f"{value.dtype} of {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"{name} is {shown}; A (r, d_in) and B (d_out, r) are dense matrices of fp32, bf16, fp16 or fp64."
            )
    if A.shape[0] != B.shape[1] or A.device != B.device:
        raise ConfigError(
            f"A is {list(A.shape)} on {A.device} and B {list(B.shape)} on {B.device}: as many rows of A as "
            "columns of B, on one device, make a product."
        )
    for name, value in (("A", A), ("B", B)):
        if not is_finite(value):
            raise DataError(f"{name} holds numbers that are not finite.")


def check_finite(name: str, value) -> None:
    """Raise ConfigError for what is no finite number."""
    check_holdable(name, value)
    held = plain(value)
    if isinstance(held, bool) or not isinstance(held, int | float) or not math.isfinite(held):
        raise ConfigError(f"{name} has {value!r:.100}; it must be a finite number.")


def share(weight: float, scale: float) -> float:
    """Return weight times scale; ConfigError where fp64 has no such number, or zero alone."""
    check_finite("weights", weight)
    check_finite("scale", scale)
    made = float(weight) * float(scale)
    if weight and scale and not _LEAST <= abs(made) < math.inf:
        where = "below" if abs(made) < 1 else "beyond"
        raise ConfigError(
            f"a weight of {weight!r} times a scale of {scale!r} is {where} the numbers of fp64. Give another weight."
        )
    return made


def check_seen(size: float, *values: Tensor) -> None:
    """Raise DataError where the norm of a product of values that are not zero is below the numbers of fp64."""
    if size < _LEAST and all(value.any() for value in values):
        raise DataError("the product of the factors has numbers below those of its precision; they are too small.")


def _is_usable(value: Tensor) -> bool:
    return value.dtype in DTYPES and value.layout is torch.strided and not value.is_meta


def is_finite(value: Tensor) -> bool:
    """Tell whether all numbers of a tensor are finite."""
    # a sum is one pass, and finite only where all its terms are; it may overflow where they are
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Qa, Qb and the matrix Rb Ra^T, which has the singular values of B A, of A and B in fp64.

    Raises DataError where its numbers are beyond fp64, or below it.
    """
    check_seen(norm(A) * norm(B), A, B)
    q_a, r_a = torch.linalg.qr(A.T)
    q_b, r_b = torch.linalg.qr(B)
    return q_a, q_b, finite(r_b @ r_a.T)


def finite(core: Tensor) -> Tensor:
    """Return a product; DataError where its numbers are beyond its precision."""
    if not is_finite(core):
        raise DataError("the product of the factors has numbers beyond those of its precision; they are too large.")
    return core


def norm(value: Tensor) -> float:
    """Return the Frobenius norm, also where squares of the entries overflow or vanish."""
    top = value.abs().max().item()
    return top * torch.linalg.norm(value / top).item() if 0 < top < math.inf else top


def signs(rows: Tensor) -> Tensor:
    """Return the sign (k,) of each row's largest entry, by magnitude."""
    sizes = rows.abs()
    top = sizes.amax(dim=1, keepdim=True) * (1 - _TIE * torch.finfo(rows.dtype).eps)
    first = (sizes >= top).to(torch.uint8).argmax(dim=1, keepdim=True)
    return torch.where(rows.gather(1, first)[:, 0] < 0, -1.0, 1.0).to(rows.dtype)


def is_regular(triangle: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a matrix (r, r) has an inverse, as numbers of a type tell it."""
    values = torch.linalg.svdvals(triangle)
    eps = max(torch.finfo(dtype).eps, torch.finfo(triangle.dtype).eps)
    return bool(values[-1] > len(values) * eps * values[0])


def stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a factor in a type; DataError where that does not hold its numbers, or loses most of them."""
    made = value.to(dtype).contiguous()
    if not is_finite(made):
        raise DataError(
            f"a factor has entries of {value.abs().max().item():.3g}, which {dtype} does not hold; use a wider type."
        )
    if dtype != value.dtype and _may_be_lost(made):
        if norm(made.to(value.dtype) - value) > _LOST * torch.finfo(dtype).eps * norm(value):
            raise DataError(
                f"a factor has entries of {value.abs().max().item():.3g} at the most, of which {dtype} loses most; use "
                "a wider type, or larger weights."
            )
    return made


def _may_be_lost(value: Tensor) -> bool:
    """Tell whether a tensor's largest number is so near the least of its type that smaller ones matter."""
    return value.abs().max().item() < torch.finfo(value.dtype).tiny * value.numel()
