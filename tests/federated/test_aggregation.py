"""Averages of clients' tensors: golden numbers, the order of clients, rules that a few of them cannot move."""

import itertools

import pytest
import torch

from posttrain.errors import ConfigError, DataError
from posttrain.federated import aggregation
from posttrain.objectives import spectrum
from tests.federated.synthetic import draw, gap


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# the example of the method's specification, with 30 and 10 rows
A = matrix([1.0, 0, 1, 0], [0, 2, 0, -1])
A2 = matrix([1.0, 1, 0, 0], [0, 1, 1, 0])
B = {"one": {"l": matrix([1.0, 0], [0, 1], [2, -1])}, "two": {"l": matrix([0.0, 1], [1, 1], [0, 3])}}
SHARES = {"one": 0.75, "two": 0.25}
MEAN_B = matrix([0.75, 0.25], [0.25, 1], [1.5, 0])
GOLDEN_A = matrix(
    [0.53762760, 0.58097375, 0.53762760, -0.29048687], [-0.45930008, 0.68005110, -0.45930008, -0.34002555]
)
GOLDEN_B = matrix([1.16955000, -0.26391817], [1.72124817, 1.47047772], [1.61288281, -1.37790023])


def test_golden_numbers_of_a_round():
    assert aggregation.shares({"two": 10, "one": 30}) == SHARES
    mean = aggregation.average(B, SHARES)
    assert torch.equal(mean["l"], MEAN_B)
    made_a, made_b = aggregation.refactored({"l": A}, mean, {"l": torch.float64})
    torch.testing.assert_close(made_a["l"], GOLDEN_A, atol=1e-8, rtol=0)
    torch.testing.assert_close(made_b["l"], GOLDEN_B, atol=1e-8, rtol=0)
    assert spectrum.singular_values(made_a["l"], made_b["l"]).tolist() == pytest.approx([2.63285651, 2.03237953])


def test_the_product_is_unchanged_by_refactoring():
    for shape in ((9, 12, 4), (3, 12, 5), (9, 4, 4), (6, 6, 1)):
        height, width, rank = shape
        a, b = draw(rank, width), draw(height, rank, seed=1)
        made_a, made_b = aggregation.refactored({"l": a}, {"l": b}, {"l": torch.float64})
        assert gap(made_b["l"] @ made_a["l"], b @ a) < 1e-13
        torch.testing.assert_close(
            made_a["l"] @ made_a["l"].T, torch.eye(rank, dtype=torch.float64), atol=1e-12, rtol=0
        )
    kept = aggregation.refactored({"l": a}, {"l": b}, {"l": torch.float32})
    assert kept[0]["l"].dtype == kept[1]["l"].dtype == torch.float32


def test_what_cannot_be_refactored_is_named():
    with pytest.raises(ConfigError, match="layers.3.q_proj: A is 4 x 3"):
        aggregation.refactored({"layers.3.q_proj": draw(4, 3)}, {"layers.3.q_proj": draw(5, 4)}, {})
    with pytest.raises(DataError, match="layers.3.q_proj: B holds numbers that are not finite"):
        aggregation.refactored({"layers.3.q_proj": draw(2, 3)}, {"layers.3.q_proj": draw(5, 2) * torch.nan}, {})


def test_stacked_factors_make_the_exact_average_of_the_products():
    factors = {"one": {"l": A}, "two": {"l": A2}}
    exact = 0.75 * B["one"]["l"] @ A + 0.25 * B["two"]["l"] @ A2
    a, b = aggregation.stack(factors, B, SHARES)["l"]
    assert a.shape == (4, 4) and b.shape == (3, 4)
    assert gap(b @ a, exact) < 1e-14
    # what FedAvg of the factors misses, and FedEx-LoRA adds
    a, b = aggregation.residual(factors, B, SHARES)["l"]
    assert torch.linalg.norm(b @ a).item() == pytest.approx(1.8656014446, abs=1e-10)
    mean_a = aggregation.average(factors, SHARES)["l"]
    assert gap(MEAN_B @ mean_a + b @ a, exact) < 1e-14
    # with one A there is nothing to miss
    a, b = aggregation.residual({"one": {"l": A}, "two": {"l": A}}, B, SHARES)["l"]
    assert torch.linalg.norm(b @ a) < 1e-14


def test_changes_of_a_base_are_added_exactly():
    first, other = (draw(2, 7), draw(5, 2, seed=1)), (draw(3, 7, seed=2), draw(5, 3, seed=3))
    a, b = aggregation.added(first, other, torch.float64)
    assert gap(b @ a, first[1] @ first[0] + other[1] @ other[0]) < 1e-13 and len(a) == 5
    a, b = aggregation.added(None, other, torch.float64)
    assert gap(b @ a, other[1] @ other[0]) < 1e-13 and len(a) == 3


def updates(count=5, seed=0):
    return {
        f"c{n}": {"l": draw(4, 3, seed=seed + n).float(), "m": draw(2, 2, seed=seed + 50 + n)} for n in range(count)
    }


ZEROS = {"l": torch.zeros(4, 3), "m": torch.zeros(2, 2)}


def _equal(given):
    return aggregation.shares(dict.fromkeys(given, 1))


def _factors(given):
    return {n: {"l": v["l"].T} for n, v in given.items()}, {n: {"l": v["l"]} for n, v in given.items()}


def _exact(pair):
    return dict(zip("AB", pair, strict=True))


RULES = {
    "mean": lambda given: aggregation.average(given, aggregation.shares({name: 7 + len(name) for name in given})),
    "rows": lambda given: aggregation.average(given, aggregation.shares({name: int(name[1]) + 1 for name in given})),
    "median": aggregation.median,
    "trimmed_mean": lambda given: aggregation.trimmed_mean(given, 0.2),
    "norm_bound": lambda given: aggregation.average(aggregation.bounded(given, ZEROS, 2.0), _equal(given)),
    "stack": lambda given: _exact(aggregation.stack(*_factors(given), _equal(given))["l"]),
    "residual": lambda given: _exact(aggregation.residual(*_factors(given), _equal(given))["l"]),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_clients_changes_no_bit(rule):
    given = updates()
    made = RULES[rule](given)
    assert all(value.dtype == torch.float64 for value in made.values())
    for order in itertools.permutations(given):
        other = RULES[rule]({name: given[name] for name in order})
        assert all(torch.equal(made[name], other[name]) for name in made)


def test_a_sum_in_the_order_of_arrival_would_change_bits():
    given = updates(seed=3)
    sums = set()
    for order in itertools.permutations(given):
        added = torch.zeros(4, 3)
        for name in order:
            added += given[name]["l"] / 5
        sums.add(added.numpy().tobytes())
    assert len(sums) > 1


def test_one_client_is_its_own_average_to_the_bit():
    (name, only), *_ = updates().items()
    for made in (
        aggregation.average({name: only}, aggregation.shares({name: 7})), aggregation.median({name: only}),
        aggregation.trimmed_mean({name: only}, 0.2),
    ):  # fmt: skip
        assert all(torch.equal(made[key], value.double()) for key, value in only.items())


def test_median_and_trimmed_mean_are_those_of_each_entry():
    values = torch.tensor([[3.0, 1], [1, 5], [2, 9], [100, -7], [-50, 2]])
    given = {f"c{n}": {"l": row} for n, row in enumerate(values)}
    assert aggregation.median(given)["l"].tolist() == [2, 2]
    # of 3, 1, 2 and of 1, 5, 2
    assert aggregation.trimmed_mean(given, 0.2)["l"].tolist() == pytest.approx([2, 8 / 3])
    # two at each end leave the median
    assert aggregation.trimmed_mean(given, 0.4)["l"].tolist() == [2, 2]
    del given["c4"]
    assert aggregation.median(given)["l"].tolist() == [2.5, 3]


@pytest.mark.parametrize(
    ("clients", "fraction", "cut"), [(5, 0.2, 1), (4, 0.2, 1), (30, 0.1, 3), (100, 0.29, 29), (3, 0.49, 1), (6, 0.4, 2)]
)
def test_a_share_of_clients_is_rounded_up_and_leaves_a_middle(clients, fraction, cut):
    assert aggregation.trimmed(clients, fraction) == cut


def test_an_update_is_shortened_to_the_bound_and_no_further():
    given, start = updates(), {"l": draw(4, 3, seed=90).float(), "m": draw(2, 2, seed=91)}
    lengths = {name: aggregation.update_norm(value, start) for name, value in given.items()}
    bound = sorted(lengths.values())[2]
    made = aggregation.bounded(given, start, bound)
    for name, value in made.items():
        assert aggregation.update_norm(value, start) == pytest.approx(min(lengths[name], bound), rel=1e-12)
        same = all(torch.equal(value[key], given[name][key].double()) for key in value)
        assert same == (lengths[name] <= bound)
        # the direction stays
        for key in value:
            ratio = (value[key] - start[key]) / (given[name][key].double() - start[key])
            torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), atol=1e-9, rtol=0)


def test_weights_are_shares_of_the_rows_or_equal():
    assert aggregation.shares({"b": 30, "a": 10}) == {"a": 0.25, "b": 0.75}
    assert aggregation.shares({"b": 30, "a": 10}, "uniform") == {"a": 0.5, "b": 0.5}
    for empty in (aggregation.shares, aggregation.median):
        with pytest.raises(DataError, match="there is no client to average"):
            empty({})
