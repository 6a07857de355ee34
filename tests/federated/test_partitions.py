"""Rows split over clients: every row once, the same for a seed, and clear words where a split cannot be."""

from collections import Counter

import pytest
from datasets import DatasetDict

from posttrain.errors import ConfigError, DataError
from posttrain.federated import partitions
from posttrain.federated.config import FederatedConfig
from posttrain.federated.seeds import rng, seed_of
from tests.federated.refused import SPLITS as REFUSED_SPLITS
from tests.federated.refused import rows

LABELS = ["a"] * 50 + ["b"] * 30 + ["c"] * 20


def settings(**given):
    return FederatedConfig(**dict(num_clients=4) | given)


def dirichlet(**given):
    return settings(**dict(partition="dirichlet", partition_column="label") | given)


def numbers(clients):
    return {name: held["number"][:] for name, held in clients.items()}


SPLITS = {
    "iid": lambda seed: settings(federated_seed=seed),
    "dirichlet": lambda seed: dirichlet(federated_seed=seed, dirichlet_alpha=1.0),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_every_row_goes_to_one_client_and_the_seed_says_to_which(kind):
    made = numbers(partitions.split(rows(), SPLITS[kind](3)))
    assert sorted(sum(made.values(), [])) == list(range(100))
    assert list(made) == ["client-0", "client-1", "client-2", "client-3"] and all(made.values())
    assert made == numbers(partitions.split(rows(), SPLITS[kind](3)))
    assert made != numbers(partitions.split(rows(), SPLITS[kind](4)))


def test_splits_of_a_seed_are_pinned():
    """They are the same ones on every machine and in every version, as the clients that a round draws are."""
    assert partitions.iid(10, 3, 0) == {"client-0": [0, 5, 8], "client-1": [4, 7, 9], "client-2": [1, 2, 3, 6]}
    made = partitions.dirichlet(list("aabbbccccc"), 3, 0.5, 0)
    assert made == {"client-0": [0, 1, 4], "client-1": [5, 6, 7, 8, 9], "client-2": [2, 3]}
    made = partitions.dirichlet([True, False] * 6, 2, 1000.0, 7)
    assert made == {"client-0": [0, 1, 2, 5, 8, 11], "client-1": [3, 4, 6, 7, 9, 10]}
    assert seed_of(0, "turn", "c0", 1) == 2003346636
    assert rng(0, "clients", 1).sample([f"c{number}" for number in range(6)], 3) == ["c4", "c0", "c2"]


def test_random_parts_differ_by_one_row_at_most():
    for count in (1, 3, 7, 100):
        sizes = [len(part) for part in partitions.iid(100, count, 0).values()]
        assert sum(sizes) == 100 and max(sizes) - min(sizes) <= 1 and len(sizes) == count


def skew(alpha):
    """Mean over many values of the largest share of a client."""
    labels = [value for value in range(40) for _ in range(50)]
    held = partitions.dirichlet(labels, 5, alpha, 0)
    counts = Counter((labels[row], name) for name, part in held.items() for row in part)
    return sum(max(counts[value, name] for name in held) for value in range(40)) / 2000


def test_a_small_alpha_gives_a_value_to_one_client_and_a_large_one_to_all():
    assert skew(0.001) > 0.99 > skew(0.1) > skew(1.0) > skew(1000.0) > 0.2
    assert skew(1000.0) < 0.25


def test_other_values_of_the_column_leave_a_values_rows_where_they_are():
    few = partitions.dirichlet(LABELS, 4, 0.5, 0)
    more = partitions.dirichlet(LABELS + ["d"] * 40, 4, 0.5, 0)
    assert few == {name: [row for row in part if row < 100] for name, part in more.items()}


def test_names_of_clients_sort_as_their_numbers():
    made = partitions.names(11)
    assert made == sorted(made) and made[2] == "client-02"


def test_given_data_sets_are_clients_in_the_order_of_their_names():
    given = DatasetDict(west=rows().select(range(3)), east=rows().select(range(5)))
    made = partitions.split(given, FederatedConfig(partition="given"))
    assert list(made) == ["east", "west"] and made["west"] is given["west"]
    assert partitions.split(given, FederatedConfig(partition="given", num_clients=2)).keys() == made.keys()


@pytest.mark.parametrize("values", [["u", "v", "u", "w"], [3, 1, 3, 2], [True, False, True, True]])
def test_a_column_may_name_the_client(values):
    config = FederatedConfig(partition="given", partition_column="site")
    made = numbers(partitions.split(rows(site=values), config))
    assert {name: [values[row] for row in part] for name, part in made.items()} == {
        str(value): [value] * values.count(value) for value in set(values)
    }
    assert list(made) == sorted(made)


@pytest.mark.parametrize("title", REFUSED_SPLITS)
def test_splits_that_cannot_be_are_refused(title):
    given, fields, said = REFUSED_SPLITS[title]
    with pytest.raises((ConfigError, DataError), match=said):
        partitions.split(given, settings(**fields))


def test_a_client_may_have_just_the_rows_it_needs():
    assert len(partitions.split(rows(), settings(min_client_rows=25))) == 4
