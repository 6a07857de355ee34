"""The private step: bounds on units however a step is split, noise once, the gradient that is written."""

import math
import random

import pytest
import torch
from torch import nn

from posttrain.errors import PosttrainError
from posttrain.privacy.step import PrivateStep, RowUnits

# unit of each of eight rows; a unit has one row or several
ALONE = list(range(8))
PEOPLE = [4, 4, 9, 7, 7, 7, 2, 0]


def parameters():
    return {"A": nn.Parameter(torch.zeros(2, 3)), "B": nn.Parameter(torch.zeros(4, 2))}


def rows(count=8, seed=0, scale=1.0):
    made = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *p.shape, generator=made) * scale for name, p in parameters().items()}


def taken(gradients, chosen):
    return {name: values[chosen].clone() for name, values in gradients.items()}


def made(gradients, units, parts=None, clip_norm=1.0, expected=1, **settings):
    """The flat gradient that a step writes, its rows split into micro-batches."""
    own = parameters()
    step = PrivateStep(own, clip_norm=clip_norm, expected=expected, **settings)
    for part in parts or [list(range(len(units)))]:
        step.collect(taken(gradients, part), RowUnits.of([units[place] for place in part]))
    found = step.finish()
    return torch.cat([p.grad.flatten() for p in own.values()]), found


def by_hand(gradients, units, clip_norm=1.0, clipping="flat"):
    total = 0
    for unit in dict.fromkeys(units):
        own = [place for place, other in enumerate(units) if other == unit]
        whole = torch.cat([values[own].sum(0).flatten() for values in gradients.values()]).double()
        norm = whole.norm()
        total = total + whole * (clip_norm / (norm + 0.01) if clipping == "automatic" else min(1, clip_norm / norm))
    return total.float()


@pytest.mark.parametrize("units", [ALONE, PEOPLE])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_the_sum_is_that_of_clipped_units(units, clipping):
    gradients = rows(scale=0.2)
    expected = by_hand(gradients, units, clipping=clipping)
    whole, found = made(gradients, units, clipping=clipping)
    torch.testing.assert_close(whole, expected)
    assert found.units == len(set(units)) and 0 < found.clipped < found.units and found.bad_rows == 0
    torch.testing.assert_close(made(gradients, units, clipping=clipping, expected=4)[0], expected / 4)


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[0], [1], [2], [3], [4], [5], [6], [7]],
        [[0, 1, 2, 3, 4, 5, 6], [7]],
        [[0], [], [1, 2, 3, 4], [], [], [5, 6], [7]],
    ],
)
@pytest.mark.parametrize("units", [ALONE, PEOPLE])
def test_any_split_gives_the_same_sum(units, parts):
    gradients = rows()
    whole, told = made(gradients, units)
    split, found = made(gradients, units, parts, spans=True)
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-6)
    assert [float(a) for a in found] == pytest.approx([float(a) for a in told])


def test_a_part_of_a_unit_that_is_clipped_for_itself_would_be_noticed():
    """The known wrong variant: each row's gradient clipped, where the unit is a person."""
    gradients = rows()
    right, wrong = by_hand(gradients, PEOPLE), by_hand(gradients, ALONE)
    assert (right - wrong).norm() > 0.3 * right.norm()
    with pytest.raises(PosttrainError, match="1 units of privacy have rows in several micro-batches"):
        made(gradients, PEOPLE, [[0], [1, 2, 3, 4, 5, 6, 7]])
    with pytest.raises(PosttrainError, match="do not follow each other"):
        made(gradients, PEOPLE, [[0, 2], [1, 3]], spans=True)


def test_sides_of_pairs_are_summed_wherever_they_lie():
    # chosen rows first, as pairs come
    gradients, units = rows(), [3, 1, 2, 5, 3, 1, 2, 5]
    torch.testing.assert_close(made(gradients, units)[0], by_hand(gradients, units))
    parts = [[0, 1, 4, 5], [2, 3, 6, 7]]
    torch.testing.assert_close(made(gradients, units, parts, spans=True)[0], by_hand(gradients, units))


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("units", [ALONE, PEOPLE])
def test_a_unit_moves_the_sum_by_no_more_than_the_bound(units, clipping):
    for seed in range(20):
        gradients = rows(seed=seed, scale=10.0 ** random.Random(seed).uniform(-4, 4))
        whole, _ = made(gradients, units, clip_norm=0.5, clipping=clipping)
        one = units[seed % 8]
        without = [place for place in range(8) if units[place] != one]
        less, _ = made(taken(gradients, without), [units[place] for place in without], clip_norm=0.5, clipping=clipping)
        assert (whole - less).norm() <= 0.5 * (1 + 1e-5)
        other = rows(seed=seed + 100)
        for name, values in other.items():
            values[without] = gradients[name][without]
        assert (whole - made(other, units, clip_norm=0.5, clipping=clipping)[0]).norm() <= 2 * 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("units", [ALONE, PEOPLE])
def test_a_row_that_is_no_number_adds_nothing_and_is_counted(units, value):
    gradients = rows()
    gradients["A"][4, 1, 1] = value
    zero = {name: values.clone() for name, values in gradients.items()}
    for values in zero.values():
        values[4] = 0
    for parts in (None, [[0, 1, 2, 3, 4], [5, 6, 7]]):
        spans = parts is not None
        whole, found = made(gradients, units, parts, spans=spans)
        torch.testing.assert_close(whole, by_hand(zero, units) if units is PEOPLE else made(zero, units)[0])
        assert found.bad_rows == 1 and torch.isfinite(whole).all()


def test_rows_of_nobody_and_steps_without_rows_add_nothing():
    gradients, own = rows(), parameters()
    gradients["B"][7] = math.nan
    step = PrivateStep(own, clip_norm=1.0, expected=1)
    step.collect(gradients, RowUnits.of([]))
    found = step.finish()
    assert all(p.grad.eq(0).all() for p in own.values())
    assert found.units == 0 == found.bad_rows == found.norms
    step.collect({}, RowUnits.of([]))
    assert step.finish().units == 0


def test_a_parameter_that_no_row_reaches_gets_the_noise_alone():
    gradients = rows()
    del gradients["B"]
    whole, _ = made(gradients, ALONE, noise_std=0.0)
    assert whole[6:].eq(0).all() and whole[:6].ne(0).all()
    assert made({}, ALONE)[1].units == 8
    assert made(gradients, ALONE, noise_std=1.0)[0][6:].ne(0).all()


@pytest.mark.parametrize("units", [ALONE, PEOPLE])
def test_consecutive_parameters_may_come_in_one_tensor(units):
    gradients = rows()
    apart, told = made(gradients, units, clip_norm=0.7)
    joined = {"A": torch.cat([values.flatten(1) for values in gradients.values()], dim=1)}
    together, found = made(joined, units, clip_norm=0.7)
    torch.testing.assert_close(together, apart)
    assert [float(a) for a in found] == pytest.approx([float(a) for a in told])
    split, _ = made(joined, units, [[0, 1, 2], [3, 4, 5, 6, 7]], clip_norm=0.7, spans=True)
    torch.testing.assert_close(split, apart)


def test_no_clipping_and_no_noise_is_the_plain_sum():
    gradients = rows()
    whole, found = made(gradients, ALONE, clip_norm=math.inf)
    torch.testing.assert_close(whole, torch.cat([values.sum(0).flatten() for values in gradients.values()]))
    assert found.clipped == 0


def test_the_noise_of_many_steps_has_the_deviation_promised():
    own = parameters()
    step = PrivateStep(own, clip_norm=0.5, noise_std=1.5 * 0.5, expected=4, source=random.Random(1).randbytes)
    gradients = rows()
    clean = by_hand(gradients, ALONE, clip_norm=0.5) / 4
    seen = []
    for _ in range(1000):
        step.collect(taken(gradients, ALONE), RowUnits.of(ALONE))
        step.finish()
        seen.append(torch.cat([p.grad.flatten() for p in own.values()]) - clean)
    seen = torch.stack(seen)
    # 14,000 values: five standard errors are 3%, a halved noise is 50% away
    assert seen.std().item() == pytest.approx(1.5 * 0.5 / 4, rel=0.03)
    assert abs(seen.mean().item()) < 5 * 1.5 * 0.5 / 4 / math.sqrt(seen.numel())
    assert torch.corrcoef(seen.T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(1000)


def test_noise_is_added_once_and_its_ranks_agree():
    gradients = rows()
    sums, written = [], []

    def rank(number, reduced):
        own = parameters()
        step = PrivateStep(
            own, clip_norm=1.0, noise_std=2.0, expected=8, adds_noise=number == 0, all_reduce=reduced,
            source=random.Random(5).randbytes,
        )  # fmt: skip
        mine = list(range(number, 8, 2))
        step.collect(taken(gradients, mine), RowUnits.of(mine))
        step.finish()
        return torch.cat([p.grad.flatten() for p in own.values()])

    for number in range(2):
        rank(number, lambda total: (sums.append(total.clone()), total)[1])
    for number in range(2):
        written.append(rank(number, lambda total: sums[0] + sums[1]))
    assert torch.equal(*written)
    one, _ = made(gradients, ALONE, noise_std=2.0, expected=8, source=random.Random(5).randbytes)
    torch.testing.assert_close(written[0], one)
    # two ranks' noise would depart by far more
    plain, _ = made(gradients, ALONE, expected=8)
    assert (written[0] - plain).norm() > 0.1


def test_two_runs_have_other_noise():
    gradients = rows()
    first, second = (made(gradients, ALONE, noise_std=1.0)[0] for _ in range(2))
    assert not torch.isclose(first, second).any()


def test_a_witness_adds_its_own_and_sees_the_noisy_sum():
    class Seen:
        def add_to(self, total):
            total[3] += 7.0

        def observe(self, noisy):
            self.sum = noisy.clone()

    seen = Seen()
    gradients = rows()
    plain, _ = made(gradients, ALONE, expected=2)
    with_one, _ = made(gradients, ALONE, expected=2, witness=seen)
    torch.testing.assert_close(with_one * 2, seen.sum)
    moved = with_one - plain
    assert moved[3] == pytest.approx(3.5) and moved.abs().sum() == pytest.approx(3.5)
    other = Seen()
    made(gradients, ALONE, adds_noise=False, witness=other)
    torch.testing.assert_close(other.sum, plain * 2)


def test_a_step_that_was_begun_anew_forgets_the_one_before():
    own, gradients = parameters(), rows()
    step = PrivateStep(own, clip_norm=1.0, expected=1, spans=True)
    step.collect(taken(gradients, ALONE), RowUnits.of(ALONE))
    step.begin()
    assert step.finish().units == 0 and all(p.grad.eq(0).all() for p in own.values())


def test_gradients_are_written_in_the_dtype_of_their_parameter():
    own = {name: nn.Parameter(p.detach().bfloat16()) for name, p in parameters().items()}
    step = PrivateStep(own, clip_norm=1.0, expected=1)
    step.collect(rows(), RowUnits.of(ALONE))
    step.finish()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.shape == p.shape for p in own.values())
