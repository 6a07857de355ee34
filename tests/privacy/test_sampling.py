"""Draws of units: each on its own at the rate that is accounted, whole, and dealt so that every draw has room."""

import math
import random

import numpy as np
import pytest
import torch

from posttrain.errors import ConfigError, DataError
from posttrain.privacy import sampling
from posttrain.privacy.sampling import PoissonUnits, cap_of, micro_batches, rows_by_unit

SECRET = bytes(range(32))


def of_single_rows(units: int, rate: float, steps: int, cap: int | None = None, **given) -> PoissonUnits:
    return PoissonUnits(
        rows_by_unit(None, units), rate=rate, cap=cap or units, rows_per_unit=1, steps=steps,
        **dict(micro_batch_size=units, micro_batches=1, secret=SECRET) | given,
    )  # fmt: skip


def taken(draws: PoissonUnits) -> np.ndarray:
    """(steps, units) booleans: who took part."""
    found = np.zeros((draws.steps, len(draws.units)), dtype=bool)
    for number, batch in enumerate(draws):
        found[number // draws.micro_batches, [unit for _, unit in batch]] = True
    return found


def test_each_unit_is_drawn_at_the_rate_and_independently_of_others_and_of_other_steps():
    part = taken(of_single_rows(400, 0.05, 500)).astype(float)
    # of 200,000 draws: 6 standard deviations are 0.003
    assert abs(part.mean() - 0.05) < 0.003
    # the number drawn in a step and the number of times a unit is drawn are binomial: their variances too
    assert part.sum(1).var() == pytest.approx(400 * 0.05 * 0.95, rel=0.35)
    assert part.sum(0).var() == pytest.approx(500 * 0.05 * 0.95, rel=0.35)
    centred = (part - part.mean()) / part.std()
    # a unit's next step, and the next unit's same step; a shuffled epoch would never draw a unit twice in 20 steps
    assert abs((centred[1:] * centred[:-1]).mean()) < 0.014
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 0.014
    windows = part[:20].sum(0)
    assert (windows >= 2).mean() == pytest.approx(1 - 0.95**20 - 20 * 0.05 * 0.95**19, abs=0.1)


def test_a_rate_of_one_draws_all_and_a_step_may_have_none():
    assert taken(of_single_rows(7, 1.0, 3)).all()
    assert not taken(of_single_rows(3, 0.01, 5)).any(axis=1).all()


def test_draws_do_not_hang_on_any_seed():
    found = []
    for _ in range(2):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        found.append(taken(of_single_rows(300, 0.5, 1, secret=None)))
    assert (found[0] != found[1]).any()


def test_a_second_iteration_draws_anew():
    draws = of_single_rows(300, 0.5, 1)
    first, second = taken(draws), taken(draws)
    assert (first != second).any()
    assert (first == taken(of_single_rows(300, 0.5, 1))).all()


def test_drawing_leaves_the_runs_generators_alone():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    taken(of_single_rows(50, 0.5, 3, secret=None))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


def test_a_draw_above_the_cap_is_cut_at_random():
    part = taken(of_single_rows(30, 0.5, 2_000, cap=5))
    assert part.sum(1).max() == 5
    # (0.5 of 30 nearly always exceeds 5) each unit is as likely as any other: 5 of 30, and neither end is favoured
    rates = part.mean(0)
    assert np.abs(rates - 5 / 30).max() < 0.05


def test_the_cap_is_six_roots_above_the_number_expected():
    assert cap_of(128, 10_000) == math.ceil(128 + 6 * math.sqrt(128)) == 196
    assert cap_of(16, 1000) == 40
    assert cap_of(128, 150) == 150
    assert cap_of(1, 10) == 7


@pytest.mark.parametrize(
    ("cap", "rows_per_unit", "size", "ranks", "wanted"),
    [(40, 1, 8, 1, 5), (41, 1, 8, 1, 6), (40, 1, 8, 2, 3), (40, 3, 8, 1, 20), (40, 8, 8, 4, 10), (1, 1, 8, 4, 1)],
)
def test_micro_batches_are_the_fewest_that_hold_units_of_the_largest_size(cap, rows_per_unit, size, ranks, wanted):
    assert micro_batches(cap, rows_per_unit, size, ranks) == wanted


def test_a_unit_has_to_fit_a_micro_batch():
    with pytest.raises(ConfigError, match="rows_per_unit is 9, and per_device_train_batch_size is 8"):
        micro_batches(40, 9, 8, 1)


def people(generator, count: int, most: int) -> list[np.ndarray]:
    sizes = generator.integers(1, most + 1, count)
    return np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("seed", range(12))
def test_every_draw_has_room_whole_on_one_rank_and_balanced(seed):
    generator = np.random.default_rng(seed)
    units = people(generator, 60, int(generator.integers(1, 12)))
    own, ranks, expected = int(generator.integers(1, 7)), int(generator.integers(1, 5)), int(generator.integers(1, 40))
    size = own + int(generator.integers(0, 9))
    cap = cap_of(expected, len(units))
    count = micro_batches(cap, own, size, ranks)
    # draws as they come, and a full one of the largest units
    largest = sorted(range(60), key=lambda unit: -len(units[unit]))[:cap]
    for source in (None, lambda step: largest, lambda step: []):
        given = dict(rate=expected / 60, cap=cap, rows_per_unit=own, micro_batch_size=size, micro_batches=count)
        draws = [
            list(PoissonUnits(units, **given, steps=4, rank=rank, ranks=ranks, secret=SECRET, source=source))
            for rank in range(ranks)
        ]
        assert [len(batches) for batches in draws] == [4 * count] * ranks
        for step in range(4):
            parts = [sum(batches[step * count : (step + 1) * count], []) for batches in draws]
            for batches in draws:
                for batch in batches[step * count : (step + 1) * count]:
                    assert len(batch) <= size
                    told = [unit for _, unit in batch]
                    # behind each other
                    assert len(set(told)) == sum(a != b for a, b in zip(told, [None, *told], strict=False))
            owners = [{unit for _, unit in part} for part in parts]
            drawn = set().union(*owners)
            assert sum(map(len, owners)) == len(drawn) <= cap
            for rank, part in enumerate(parts):
                for unit in owners[rank]:
                    rows = [row for row, owner in part if owner == unit]
                    assert len(set(rows)) == len(rows) == min(own, len(units[unit]))
                    assert set(rows) <= set(units[unit].tolist())
            assert max(map(len, owners)) <= math.ceil(cap / ranks)
            if len(drawn) <= cap // 2:
                held = [len(part) for part in parts]
                assert max(held) - min(held) <= own


def test_rows_of_a_unit_are_chosen_anew_and_each_as_often():
    draws = PoissonUnits(
        [np.arange(10)], rate=1.0, cap=1, rows_per_unit=3, micro_batch_size=3, micro_batches=1, steps=2_000,
        secret=SECRET,
    )  # fmt: skip
    counts = np.zeros(10)
    for batch in draws:
        counts[[row for row, _ in batch]] += 1
    assert np.abs(counts / 2_000 - 0.3).max() < 0.06


def test_the_work_is_in_the_first_micro_batches():
    draws = of_single_rows(12, 1.0, 1, micro_batch_size=4, micro_batches=5)
    assert [len(batch) for batch in draws] == [4, 4, 4, 0, 0]


def test_units_are_the_values_of_a_column():
    found = rows_by_unit(["b", "a", "b", 1, "1", np.int64(1)], 6)
    assert [list(own) for own in found] == [[0, 2], [1], [3, 5], [4]]
    assert [list(own) for own in rows_by_unit(None, 3)] == [[0], [1], [2]]


@pytest.mark.parametrize("value", [None, "", 1.5, math.nan, True, ["a"], {"a": 1}])
def test_a_row_that_belongs_to_nobody_is_refused(value):
    with pytest.raises(DataError, match="row 1 has .* in person; each row needs a text or a whole number"):
        rows_by_unit(["a", value], 2, "person")


def test_ranks_share_one_secret(monkeypatch):
    said = []
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", said.append)
    assert len(sampling.shared_secret(1)) == 32 and not said
    secret = sampling.shared_secret(2)
    assert said == [[secret]]
