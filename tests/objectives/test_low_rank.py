"""The algebra of two factors: golden numbers, the full product's SVD, sums, and what a truncation leaves out."""

import math

import pytest
import torch

from posttrain.errors import ConfigError, DataError
from posttrain.objectives import low_rank, spectrum
from posttrain.objectives.low_rank import merge, refactor, refactored, truncate

A = torch.tensor([[1.0, 0, 1, 0], [0, 2, 0, -1]], dtype=torch.float64)
# the mean of two clients' B, weighted 30 : 10
B = torch.tensor([[0.75, 0.25], [0.25, 1.0], [1.5, 0.0]], dtype=torch.float64)
GOLDEN_A = [[0.53762760, 0.58097375, 0.53762760, -0.29048687], [-0.45930008, 0.68005110, -0.45930008, -0.34002555]]
GOLDEN_B = [[1.16955000, -0.26391817], [1.72124817, 1.47047772], [1.61288281, -1.37790023]]
# (d_out, d_in, r): ordinary, r = 1, more rows than outputs, square, as many rows as inputs
SHAPES = [(9, 12, 4), (9, 12, 1), (3, 12, 5), (6, 6, 6), (9, 4, 4)]


def draw(d_out, d_in, rank, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, d_in, generator=generator, dtype=dtype),
        torch.randn(d_out, rank, generator=generator, dtype=dtype),
    )


def gap(made, exact):
    return (torch.linalg.norm(made - exact) / torch.linalg.norm(exact)).item()


def test_golden_numbers_of_a_refactorisation():
    made_a, made_b = refactor(A, B)
    torch.testing.assert_close(made_a, torch.tensor(GOLDEN_A, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(made_b, torch.tensor(GOLDEN_B, dtype=torch.float64), atol=1e-8, rtol=0)
    assert spectrum.singular_values(A, B).tolist() == pytest.approx([2.63285651, 2.03237953], abs=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_are_those_of_the_products_svd(shape):
    a, b = draw(*shape)
    made_a, made_b = refactor(a, b)
    assert made_a.shape == a.shape and made_b.shape == b.shape
    assert gap(made_b @ made_a, b @ a) < 1e-11
    torch.testing.assert_close(made_a @ made_a.T, torch.eye(len(a), dtype=a.dtype), atol=1e-11, rtol=0)
    # a row's size in the product is its singular value
    values = torch.linalg.svdvals(b @ a)[: len(a)]
    torch.testing.assert_close(made_b.norm(dim=0)[: len(values)], values, atol=1e-11, rtol=0)
    left = made_b.T @ made_b
    torch.testing.assert_close(left, torch.diag(left.diagonal()), atol=1e-11, rtol=0)
    assert (made_a.gather(1, made_a.abs().argmax(1, keepdim=True)) > 0).all()
    # its rows span those of A, beyond the rank of the product too
    torch.testing.assert_close(a @ made_a.T @ made_a, a, atol=1e-11, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_change_of_basis_makes_the_factors(shape):
    a, b = draw(*shape)
    made = refactored(a, b)
    torch.testing.assert_close(made.to @ a, made.A, atol=1e-11, rtol=0)
    torch.testing.assert_close(b @ made.back, made.B, atol=1e-11, rtol=0)
    torch.testing.assert_close(made.to @ made.back, torch.eye(len(a), dtype=a.dtype), atol=1e-11, rtol=0)


def test_equal_products_have_equal_factors():
    a, b = draw(9, 12, 4)
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(refactor(a, b), refactor(mix @ a, b @ torch.linalg.inv(mix)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)
    # of entries that are equally large the first one is positive, whichever rounding makes larger
    for bit in (0.0, 1e-15, -1e-15):
        tied = torch.tensor([[1.0, -1.0 - bit, 0.5]], dtype=torch.float64)
        for sign in (1, -1):
            assert refactor(sign * tied, b[:, :1])[0][0, 0] > 0


def test_a_b_of_zeros_keeps_the_rows_of_a():
    a, b = draw(9, 12, 4)
    made_a, made_b = refactor(a, torch.zeros_like(b))
    assert not made_b.any()
    torch.testing.assert_close(a @ made_a.T @ made_a, a, atol=1e-11, rtol=0)


def test_an_a_whose_rows_depend_on_each_other_is_refactored_without_a_change_of_basis():
    a, b = draw(9, 12, 4)
    a[3] = 2 * a[0] - a[1]
    made = refactored(a, b)
    assert made.to is None and made.back is None
    assert gap(made.B @ made.A, b @ a) < 1e-11
    torch.testing.assert_close(made.A @ made.A.T, torch.eye(4, dtype=a.dtype), atol=1e-11, rtol=0)
    assert made.B[:, 3].norm() < 1e-11 < refactored(*draw(9, 12, 4)).B[:, 3].norm()
    nothing = refactor(torch.zeros_like(a), b)
    assert not nothing[1].any() and torch.isfinite(nothing[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_given_type_and_fp64_is_within(dtype):
    a, b = draw(64, 48, 4)
    # rows that nearly agree: in fp32 the small ones would be lost
    a[1:] = a[0] + 1e-3 * a[1:]
    a, b = a.to(dtype), b.to(dtype)
    exact = b.double() @ a.double()
    eps = torch.finfo(dtype).eps
    made = refactor(a, b)
    assert made[0].dtype == made[1].dtype == dtype
    assert gap(made[1].double() @ made[0].double(), exact) < 4 * eps
    if dtype == torch.float32:
        within = refactored(a, b).A.double(), refactored(a, b, precision=torch.float32).A.double()
        straight = refactor(a.double(), b.double())[0]
        off = [gap(made, straight) for made in within]
        assert off[0] < 1e-6 < 1e-5 < off[1]


BAD = [
    (dict(A=A[0]), ConfigError, r"A is torch.float64 of \[4\]"),
    (dict(A=A.tolist()), ConfigError, "A is list"),
    (dict(A=A.long()), ConfigError, "A is torch.int64"),
    (dict(A=A[:0], B=B[:, :0]), ConfigError, r"A is torch.float64 of \[0, 4\]"),
    (dict(B=B.T), ConfigError, r"A is \[2, 4\] on cpu and B \[2, 3\] on cpu: as many rows of A as columns of B"),
    (dict(A=A * math.inf), DataError, "A holds numbers that are not finite"),
    (dict(B=B * math.nan), DataError, "B holds numbers that are not finite"),
    (dict(A=A * 1e200, B=B * 1e200), DataError, "numbers beyond those of its precision"),
]


@pytest.mark.parametrize(("change", "kind", "said"), BAD)
def test_what_is_no_product_is_answered(change, kind, said):
    given = dict(A=A, B=B) | change
    for compute in (refactor, truncate, spectrum.singular_values):
        with pytest.raises(kind, match=said):
            compute(**given)


def test_what_cannot_be_orthonormal_or_stored_is_answered():
    with pytest.raises(ConfigError, match="A is 5 x 3: of 3 inputs no 5 rows are orthonormal"):
        refactor(*draw(9, 3, 5))
    with pytest.raises(ConfigError, match="precision is torch.float16"):
        refactor(A, B, precision=torch.float16)
    with pytest.raises(DataError, match="which torch.float16 does not hold"):
        refactor((A * 300).half(), (B * 300).half())


def test_two_types_make_the_wider_one():
    a, b = draw(9, 12, 4, dtype=torch.float32)
    exact = b.bfloat16().double() @ a.double()
    for made_a, made_b in (refactor(a, b.bfloat16()), refactored(a, b.bfloat16())[:2]):
        assert made_a.dtype == made_b.dtype == torch.float32
        # in bf16 it would be off by 2e-3
        assert gap(made_b.double() @ made_a.double(), exact) < 1e-6
    mixed = refactor(a.bfloat16(), b.half())
    assert mixed[0].dtype == mixed[1].dtype == merge([(a.bfloat16(), b.half(), 1.0)]).B.dtype == torch.float32


def test_a_refactorisation_that_its_type_is_too_narrow_for_is_refused():
    a, b = torch.eye(2, 3) * 1e-4, torch.eye(4, 2) * 1e-4
    with pytest.raises(DataError, match="which torch.float16 loses most; use a wider type"):
        refactor(a.half(), b.half())
    assert gap(torch.mm(*refactor(a, b)[::-1]), b @ a) < 1e-6


TINY = torch.full_like(A, 1e-170)


@pytest.mark.parametrize(
    ("compute", "kind", "said"),
    [
        (lambda: merge([(A, B, 1e-200)], [1e-200]), ConfigError, "weight of 1e-200 times a scale of 1e-200 is below"),
        (lambda: merge([(A, B, 1e-160)], [-1e-160]), ConfigError, "is below the numbers of fp64"),
        (lambda: merge([(A, B, -1e200)], [1e200]), ConfigError, "times a scale of -1e\\+200 is beyond the numbers"),
        (lambda: merge([(A, B, 1.0), (A, B, 1e-320)]), ConfigError, "is below the numbers of fp64"),
        (lambda: merge([(TINY, B * 1e-170, 1.0)]), DataError, "below those of its precision; they are too small"),
        (lambda: merge([(A * 1e200, B * 1e-170, 1e-150)]), DataError, "they are too small"),
        (lambda: spectrum.singular_values(TINY, B * 1e-170), DataError, "they are too small"),
        (lambda: spectrum.singular_values(A, B, 1e-310), DataError, "they are too small"),
        (lambda: spectrum.singular_values(A, B, 1.7e308), DataError, "they are too large"),
        (lambda: spectrum.singular_values(A, B, math.nan), ConfigError, "scale has nan"),
        (lambda: spectrum.singular_values(A, B, "1"), ConfigError, "scale has '1'"),
    ],
)
def test_what_fp64_does_not_hold_is_answered(compute, kind, said):
    with pytest.raises(kind, match=said):
        compute()


def test_zeros_and_products_that_are_zero_are_taken():
    zero = merge([(A, B, 0.0), (A, B * 0, 1.0)])
    assert not zero.B.any() and zero.relative_error == 0.0
    # rows and columns that cancel
    apart = torch.eye(2, 4, dtype=torch.float64)[[0, 0]], torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert not merge([(*apart, 1.0)]).B.any() and spectrum.singular_values(*apart).tolist() == [0.0]
    assert spectrum.singular_values(A, B, 0.0).tolist() == [0.0, 0.0]
    assert spectrum.singular_values(A * 1e-100, B * 1e-100).tolist() == pytest.approx(
        [2.63285651e-200, 2.03237953e-200]
    )


def full(parts, weights):
    return sum(weight * scale * (b @ a) for weight, (a, b, scale) in zip(weights, parts, strict=True))


@pytest.mark.parametrize("d_in", [12, 5])
def test_a_sum_is_exact_and_of_its_own_rank(d_in):
    parts = [(*draw(9, d_in, 4, 1), 2.0), (*draw(9, d_in, 2, 2), 0.5), (*draw(9, d_in, 1, 3), 1.0)]
    weights = [0.7, -0.3, 1.5]
    made = merge(parts, weights)
    exact = full(parts, weights)
    assert gap(made.B @ made.A, exact) < 1e-11 and made.relative_error < 1e-11
    assert len(made.A) == min(7, d_in) == len(made.singular_values)
    torch.testing.assert_close(made.singular_values, torch.linalg.svdvals(exact)[: len(made.A)], atol=1e-11, rtol=0)
    torch.testing.assert_close(made.A @ made.A.T, torch.eye(len(made.A), dtype=torch.float64), atol=1e-11, rtol=0)
    # the order of what is added does not matter
    turned = merge(parts[::-1], weights[::-1])
    torch.testing.assert_close(turned.B, made.B, atol=1e-11, rtol=0)
    assert gap(full(parts, [1, 1, 1]), exact) > 0.1


def test_what_adapters_share_is_not_counted_twice():
    a, b = draw(9, 12, 4)
    small = draw(9, 12, 1, 5)
    # of the same rows, in other factors
    again = (3 * a[[2, 0, 1, 3]], b[:, [2, 0, 1, 3]], 1 / 3)
    assert len(merge([(a, b, 1.0), again]).A) == 4
    assert len(merge([(a, b, 1.0), again, (*small, 1e-6)]).A) == 5
    # stored in less than fp64, a copy of it differs from it, which is told and kept
    assert len(merge([(a, b, 1.0), (a.float(), b.float(), -1.0)]).A) > 1
    nothing = merge([(a, b, 1.0), again], [1.0, -1.0])
    assert nothing.A.shape == (1, 12) and not nothing.B.any()
    assert nothing.relative_error == 0.0 and nothing.singular_values.tolist() == [0.0]


@pytest.mark.parametrize(("given", "kept"), [(dict(rank=3), 3), (dict(rank=99), 6), (dict(energy=0.9), 4),
                                            (dict(energy=1.0), 6), (dict(energy=1e-9), 1), (dict(), 6)])  # fmt: skip
def test_a_truncation_is_the_best_one_and_tells_its_error(given, kept):
    # of the squares the first ones are 51%, 76%, 89%, 95%, ... of the sum
    values = torch.tensor([8.0, 4, 2, 1, 0.5, 0.25], dtype=torch.float64).sqrt()
    left, right = (torch.linalg.qr(torch.randn(size, 6, dtype=torch.float64))[0] for size in (9, 12))
    made = truncate(right.T, left * values, scale=-2.0, **given)
    exact = -2.0 * (left * values) @ right.T
    tail = (values[kept:].square().sum() / values.square().sum()).sqrt().item()
    assert len(made.A) == kept
    assert made.relative_error == pytest.approx(tail, abs=1e-11)
    assert gap(made.B @ made.A, exact) == pytest.approx(tail, abs=1e-11)
    torch.testing.assert_close(made.singular_values, 2 * values, atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_tells_what_storing_rounds(dtype):
    parts = [tuple(draw(64, 48, 4, seed, torch.float32)) + (1.0,) for seed in (1, 2)]
    made = merge(parts, dtype=dtype)
    exact = full([(a.double(), b.double(), s) for a, b, s in parts], [1, 1])
    assert made.A.dtype == made.B.dtype == dtype
    assert made.relative_error == pytest.approx(gap(made.B.double() @ made.A.double(), exact), rel=1e-6)
    assert torch.finfo(dtype).eps / 20 < made.relative_error < torch.finfo(dtype).eps
    assert merge(parts).A.dtype == torch.float32
    mixed = [(*parts[0][:2], 1.0), (*(part.bfloat16() for part in parts[1][:2]), 1.0)]
    assert merge(mixed).A.dtype == torch.float32


REFUSED = [
    (dict(factors=[]), "merge takes one or more of"),
    (dict(factors=[(A, B)]), r"\(A, B, scale\), each a triple"),
    (dict(weights=[1.0, 2.0]), "there are 2 weights for 1 adapters"),
    (dict(weights=[0]), "all weights are 0"),
    (dict(weights=[math.nan]), "weights has nan; it must be a finite number"),
    (dict(weights=[True]), "weights has True"),
    (dict(weights=["1"]), "weights has '1'"),
    (dict(weights=[10**400]), "weights is a number beyond"),
    (dict(factors=[(A, B, math.inf)]), "scale has inf"),
    (dict(factors=[(A, B, 1.0), (A[:, :3], B, 1.0)]), "3 x 3 on cpu cannot be added to those of 3 x 4 on cpu"),
    (dict(rank=0), "rank=0 must be an integer of at least 1"),
    (dict(rank=True), "rank=True must be an integer"),
    (dict(rank=1.5), "rank=1.5 must be an integer"),
    (dict(energy=0), "energy=0 must be a number above 0 and at most 1"),
    (dict(energy=1.1), "energy=1.1 must be a number above 0 and at most 1"),
    (dict(energy=math.nan), "energy=nan must be"),
    (dict(rank=1, energy=0.5), "rank is 1 and energy is 0.5; give one of them"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_a_sum_that_cannot_be_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        merge(**dict(factors=[(A, B, 1.0)]) | change)


def test_effective_ranks():
    assert spectrum.effective_rank(torch.tensor([2.0, 2, 2])) == pytest.approx(3)
    # entropy of (3/4, 1/4): 0.562335 nats
    assert spectrum.effective_rank(torch.tensor([3.0, 1, 0])) == pytest.approx(math.exp(0.5623351446))
    assert spectrum.effective_rank(torch.zeros(3)) == 0.0


def test_a_norm_of_what_cancels_is_accurate():
    a, b = draw(9, 12, 2)
    rest = draw(9, 12, 1, 4)
    size = 1e-10
    found = spectrum.product_norm(torch.cat([a, a, rest[0]]), torch.cat([b, -b, size * rest[1]], dim=1))
    assert found == pytest.approx(size * torch.linalg.norm(rest[1] @ rest[0]).item(), rel=1e-4)


def test_a_sum_beyond_fp64_is_refused():
    A, B = torch.ones(2, 3, dtype=torch.float64), torch.full((4, 2), 1e155, dtype=torch.float64)
    with pytest.raises(DataError, match="too large"):
        low_rank.merge([(A, B, 1.0)], [1e154])


def test_squares_beyond_fp64_do_not_make_a_sum_zero():
    A, B = torch.eye(2, 3, dtype=torch.float64), torch.eye(4, 2, dtype=torch.float64)
    for weight in (1e154, 1e200, 1e-170):
        made = low_rank.merge([(A, B, 1.0)], [weight])
        assert (made.B @ made.A / weight).allclose(B @ A) and made.relative_error < 1e-11


def test_what_a_type_is_too_narrow_for_is_refused():
    A, B = torch.eye(2, 3), torch.eye(4, 2)
    for rank, scale in ((None, 1e-60), (2, 1e-50), (1, 1e-45)):
        with pytest.raises(DataError, match="wider type"):
            low_rank.truncate(A, B, rank, scale=scale)
    assert low_rank.truncate(A, B, scale=1e-30).relative_error < 1e-6


def test_an_energy_keeps_the_same_rank_at_any_size():
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    for size in (1e-170, 1.0, 1e170):
        assert spectrum.kept_rank(values * size, energy=0.9) == 3


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, "float32", torch.float8_e4m3fn])
def test_results_are_of_a_floating_type(dtype):
    with pytest.raises(ConfigError, match="dtype is"):
        truncate(A, B, dtype=dtype)


def test_other_values_than_factors_are_answered():
    for given in (5, [], [1, 2], None):
        with pytest.raises(ConfigError, match="triple"):
            merge(given)
    with pytest.raises(ConfigError, match="weights is 5"):
        merge([(A, B, 1.0)], 5)
    for bad in (A.to_sparse(), A.to("meta"), A.to(torch.float8_e4m3fn)):
        with pytest.raises(ConfigError, match="dense matrices"):
            merge([(bad, B, 1.0)])


def nearly_orthonormal(off: float, rank=6, width=40):
    """Rows whose A A^T is so far from I in the Frobenius norm."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64)).Q.T
    turn = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    turn = turn + turn.T
    # (I + s) (I + s)^T = I + 2 s + s^2
    size = (math.sqrt(1 + off) - 1) if off else 0.0
    return rows + size * turn / torch.linalg.matrix_norm(turn, ord=2) @ rows


@pytest.mark.parametrize("off", [0.0, 1e-7, 4e-3, 0.05, 0.3])
def test_rows_that_are_orthonormal_already_have_the_factors_of_all_others(off, monkeypatch):
    a, b = nearly_orthonormal(off), torch.randn(30, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    calls, own = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda value, **given: calls.append(value.shape) or own(value, **given))
    found = refactored(a, b)
    # of A a factorisation is made where it is not orthonormal
    assert len(calls) == (1 if off < 0.1 else 2)
    monkeypatch.setattr(low_rank, "_NEARLY", 0.0)
    expected = refactored(a, b)
    for made, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(made, wanted, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(found.A @ found.A.T, torch.eye(6, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(found.B @ found.A, b @ a, atol=1e-13, rtol=1e-13)


def test_a_hundred_refactorisations_keep_rows_orthonormal_to_what_storing_rounds():
    a, b = (part.float() for part in (nearly_orthonormal(0.3), torch.ones(30, 6)))
    generator = torch.Generator().manual_seed(5)
    for _ in range(100):
        b = b + 0.1 * torch.randn(b.shape, generator=generator)
        a, b = refactor(a, b)
    assert torch.linalg.norm(a.double() @ a.double().T - torch.eye(6, dtype=torch.float64)) < 1e-6
