"""Algebra of low-rank changes of a weight, s B A with A (r, d_in) and B (d_out, r), from the two factors alone.

Nothing here forms the product (d_out, d_in). What a product's singular value decomposition tells is had from
A^T = Qa Ra and B = Qb Rb: that of the small matrix Rb Ra^T, in O((d_in + d_out) r^2 + r^3).

Source: arXiv 2505.12805 (FedSVD) for the refactorisation; the sum and its truncation are Eckart and Young's.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.checks import check_integer, check_number, plain
from posttrain.errors import ConfigError, DataError
from posttrain.objectives.factors import (
    DTYPES,
    check,
    check_finite,
    check_seen,
    core,
    finite,
    is_regular,
    norm,
    share,
    signs,
    stored,
)
from posttrain.objectives.spectrum import kept_rank, product_norm

_PRECISIONS = (torch.float64, torch.float32)
# of ||A A^T - I||, what rounding of 16 bits may come to; below it A A^T has eigenvalues near 1
_NEARLY = 0.1


class Refactored(NamedTuple):
    """A product in its canonical factors, and how the given ones were turned into them.

    Attributes:
        A: (r, d_in), orthonormal rows in the order of their singular values; A' = N A.
        B: (d_out, r), the left singular vectors times the singular values; B' = B N^-1.
        to: N (r, r); None where the given A has no full row rank, and so no N exists.
        back: N^-1 (r, r), as `to`.
    """

    A: Tensor
    B: Tensor
    to: Tensor | None
    back: Tensor | None


class Compressed(NamedTuple):
    """A product, or sum of products, in as few columns and rows as it needs or was given.

    Attributes:
        A: (k, d_in), orthonormal rows in the order of their singular values. B: (d_out, k), with every scale in it.
        singular_values: of the exact product, the largest first, without those that are rounding alone; in fp64.
        relative_error: ||B A - exact|| / ||exact|| in the Frobenius norm, with what storing in A's type rounds; 0
            where both are zero.
        norms: ||B A - exact|| and ||exact||.
    """

    A: Tensor
    B: Tensor
    singular_values: Tensor
    relative_error: float
    norms: tuple[float, float]


def refactor(A: Tensor, B: Tensor, *, precision: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Write the product B A with an orthonormal A, its rows in the order of the singular values; returns (A', B').

    A' is the first r right singular vectors of B A, B' the left ones times the singular values, each row of A' with its
    largest entry positive, so that equal products have equal factors (but for turns within equal singular values).
    Where B A has a lower rank, also where d_out < r, B' has columns of zeros, and the rows of A' beside them complete
    an orthonormal basis, which spans the rows of A wherever those are independent.

    Args:
        A: (r, d_in), r <= d_in. B: (d_out, r). Both on one device. The results have their floating type, and of two
            the one that holds both (fp32 of bf16 and fp16), as sums of `merge` do.
        precision: of the computation: torch.float64, or float32 where a device has no other.

    Raises:
        ConfigError: shapes or devices that do not fit, or d_in < r, of which no r rows are orthonormal.
        DataError: numbers that are not finite, or whose product is beyond the type or too small for it.
    """
    return refactored(A, B, precision=precision, basis=False)[:2]


def refactored(A: Tensor, B: Tensor, *, precision: torch.dtype = torch.float64, basis: bool = True) -> Refactored:
    """Refactor as `refactor` does, and return the change of basis N as well, in `precision`; without it, None."""
    check(A, B)
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision is {precision}; it must be torch.float64 or torch.float32.")
    rank, width = A.shape
    if width < rank:
        raise ConfigError(
            f"A is {rank} x {width}: of {width} inputs no {rank} rows are orthonormal. Truncate the product to a rank "
            f"of {width} or less first."
        )
    a, b = A.detach().to(precision), B.detach().to(precision)
    gram = a @ a.T
    nearly = torch.linalg.norm(gram - torch.eye(rank, dtype=a.dtype, device=a.device)) < _NEARLY
    turned, outer, to, back = _turned(a, b, gram) if nearly else _factored(a, b, basis, A.dtype)
    dtype = torch.promote_types(A.dtype, B.dtype)
    return Refactored(stored(turned, dtype), stored(outer, dtype), to, back)


def _factored(a: Tensor, b: Tensor, basis: bool, dtype: torch.dtype) -> tuple:
    """Return A', B', N and N^-1 of any factors; the latter two None without `basis`, and where A has no full rank."""
    q_a, r_a = torch.linalg.qr(a.T)
    q_b, r_b = torch.linalg.qr(b)
    # where d_out < r the core is wide, and the rows of its whole V^T stand for the missing directions too
    left, values, right = torch.linalg.svd(finite(r_b @ r_a.T), full_matrices=True)
    turned = right @ q_a.T
    sides = signs(turned)
    right, turned, found = sides[:, None] * right, turned.mul_(sides[:, None]), len(values)
    # of the transposes, which lie row by row in memory
    outer = ((left[:, :found] * (values * sides[:found])).T @ q_b.T).T
    if found < len(a):
        outer = torch.cat([outer, outer.new_zeros(len(outer), len(a) - found)], dim=1)
    to = back = None
    if basis and is_regular(r_a, dtype):
        # N = V^T Ra^-T
        to = torch.linalg.solve_triangular(r_a, right.T, upper=True).T.contiguous()
        back = r_a.T @ right.T
    return turned, outer, to, back


def _turned(a: Tensor, b: Tensor, gram: Tensor) -> tuple:
    """Return A' = N A, B' = B N^-1, N and N^-1 where the rows of A are orthonormal but for how they were stored.

    By Cholesky of A A^T, which is as exact there as a QR, and without the orthonormal bases of A and B: in less than
    half the time.
    """
    r_a = torch.linalg.cholesky(gram).T
    r_b = torch.linalg.qr(b, mode="r").R
    _, values, right = torch.linalg.svd(finite(r_b @ r_a.T), full_matrices=True)
    to = torch.linalg.solve_triangular(r_a, right.T, upper=True).T
    turned = to @ a
    sides = signs(turned)
    to, turned = (sides[:, None] * to).contiguous(), turned.mul_(sides[:, None])
    back = r_a.T @ (sides[:, None] * right).T
    outer = b @ back
    # singular values that the product does not have
    outer[:, len(values) :] = 0.0
    return turned, outer, to, back


def truncate(
    A: Tensor,
    B: Tensor,
    rank: int | None = None,
    energy: float | None = None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Compressed:
    """Find the best approximation of scale B A of a lower rank, in factors; computed in fp64.

    Args:
        A: (r, d_in). B: (d_out, r); r may be larger than either width.
        rank: the most that the result may have. energy: in (0, 1], the least share of the sum of squared singular
            values that it keeps, with the fewest of them. Without both, all that are not rounding.
        scale: of the product, which the result's B holds.
        dtype: of the result; that of the factors by default.

    Raises:
        ConfigError: both of rank and energy, one out of range, shapes that do not fit, or a weight whose product with
            its scale is beyond fp64 or below it.
        DataError: numbers that are not finite, or whose product is beyond the type or too small for it.
    """
    return merge([(A, B, scale)], None, rank, energy, dtype=dtype)


def merge(
    factors: Sequence[tuple[Tensor, Tensor, float]],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Compressed:
    """Add products w_i s_i B_i A_i and write the sum in factors of its own rank, or of a lower one; computed in fp64.

    The sum is exact: [w_1 s_1 B_1, w_2 s_2 B_2, ...] times [A_1; A_2; ...], whatever the ranks r_i. Left out of it are
    the singular values that are rounding alone, of up to eps max(d_out, d_in) sum_i ||w_i s_i B_i|| ||A_i||. A sum that
    is zero has rank one, and a B of zeros.

    Args:
        factors: (A_i, B_i, s_i) each, A_i (r_i, d_in) and B_i (d_out, r_i).
        weights: w_i, of any sign; 1 each by default.
        rank, energy: as in `truncate`.
        dtype: of the result; by default the one that holds all of the factors'.

    Raises:
        ConfigError, DataError: as `truncate`; also where there is nothing to add, or as many weights as factors are
            not there.
    """
    check_size(rank, energy)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r:.100}; it must be one of {', '.join(map(str, DTYPES))}.")
    factors = list(factors) if isinstance(factors, list | tuple) else []
    if not factors or not all(isinstance(entry, list | tuple) and len(entry) == 3 for entry in factors):
        raise ConfigError("merge takes one or more of (A, B, scale), each a triple.")
    weights = check_weights(weights, len(factors))
    outer, inner, size = [], [], 0.0
    for (a, b, scale), weight in zip(factors, weights, strict=True):
        check(a, b)
        factor = share(weight, scale)
        first = factors[0]
        if (a.shape[1], b.shape[0], a.device) != (first[0].shape[1], first[1].shape[0], first[0].device):
            raise ConfigError(
                f"factors of {b.shape[0]} x {a.shape[1]} on {a.device} cannot be added to those of "
                f"{first[1].shape[0]} x {first[0].shape[1]} on {first[0].device}: they change other weights."
            )
        a, b = a.detach().double(), b.detach().double()
        inner.append(a)
        outer.append(b * factor)
        part = norm(a) * norm(outer[-1])
        if factor:
            check_seen(min(part, norm(outer[-1])), a, b)
        size += part
    if not math.isfinite(size):
        raise DataError("the sum has numbers beyond those of its precision; weights or scales are too large.")
    exact_a, exact_b = torch.cat(inner), torch.cat(outer, dim=1)
    q_a, q_b, small = core(exact_a, exact_b)
    left, values, right = torch.linalg.svd(small, full_matrices=False)
    least = torch.finfo(torch.float64).eps * max(exact_a.shape[1], exact_b.shape[0]) * size
    values = values[: max(int((values > least).sum()), 1)]
    if values[0] <= least:
        values = torch.zeros_like(values)
    kept = kept_rank(values, rank, energy)
    turned = right[:kept] @ q_a.T
    sides = signs(turned)
    if dtype is None:
        dtype = factors[0][0].dtype
        for a, b, _ in factors:
            dtype = torch.promote_types(dtype, torch.promote_types(a.dtype, b.dtype))
    made_a = stored(sides[:, None] * turned, dtype)
    scaled = (q_b @ left[:, :kept]) * (sides * values[:kept])
    made_b = stored(scaled, dtype)
    gap = product_norm(torch.cat([exact_a, made_a.double()]), torch.cat([exact_b, -made_b.double()], dim=1))
    whole = norm(values)
    error = gap / whole if whole else (0.0 if not made_b.any() else math.inf)
    return Compressed(made_a, made_b, values, error, (gap, whole))


def check_size(rank: int | None, energy: float | None) -> None:
    """Raise ConfigError for a rank or an energy that cannot be, or both."""
    if rank is not None and energy is not None:
        raise ConfigError(f"rank is {rank!r} and energy is {energy!r}; give one of them.")
    if rank is not None:
        check_integer("rank", rank, 1)
    if energy is not None:
        check_number("energy", energy, 0, 1, above=True)


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return `count` weights, 1 each by default; ConfigError for others than so many finite numbers, or zeros alone."""
    weights = [1.0] * count if weights is None else plain(weights)
    if not isinstance(weights, list | tuple):
        raise ConfigError(f"weights is {weights!r:.100}; give a list, a number for each adapter.")
    if len(weights) != count:
        raise ConfigError(f"there are {len(weights)} weights for {count} adapters; give one for each.")
    for weight in weights:
        check_finite("weights", weight)
    if not any(weights):
        raise ConfigError("all weights are 0, so there is nothing to add.")
    return [float(weight) for weight in weights]
