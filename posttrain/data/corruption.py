"""Label noise put in on purpose, to measure how a method bears it."""

import random
from collections.abc import Mapping

from posttrain.data.sides import swapped


def flip_preferences(dataset, rate: float, seed: int = 0):
    """Swap chosen and rejected in exactly `round(rate * len(dataset))` rows, and say which.

    What belongs to one of the sides, such as its score, goes with it: see `posttrain.data.sides.swapped`. The bool
    column `flipped` tells whether a row was swapped; where the data set has one already, whether it was swapped an odd
    number of times. Rows keep their order, other columns their values. A pure function of its arguments; for one seed,
    the rows flipped at a lower rate are flipped at a higher one too.

    `dataset`: a `datasets.Dataset`. `rate`: a share in [0, 1), else ValueError.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate} must lie in [0, 1): the share of the rows to swap.")
    if not {"chosen", "rejected"} <= set(dataset.column_names):
        raise ValueError(f"flip_preferences needs the columns 'chosen' and 'rejected'; found {dataset.column_names}.")
    chosen = rows_to_flip(len(dataset), rate, seed)

    def flip(row: dict, index: int) -> dict:
        return flip_row(row, index in chosen)

    return dataset.map(flip, with_indices=True, desc="Flipping labels")


def rows_to_flip(count: int, rate: float, seed: int) -> set[int]:
    """Exactly `round(rate * count)` of the numbers below `count`."""
    return set(random.Random(seed).sample(range(count), count)[: round(rate * count)])


def flip_row(row: Mapping, swap: bool) -> dict:
    """The row with its column `flipped`, and its sides swapped where `swap` says so."""
    return (swapped(row) if swap else dict(row)) | {"flipped": bool(row.get("flipped")) != swap}
