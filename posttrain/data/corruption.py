"""Label noise put in on purpose, to measure how a method bears it."""

import random
from collections.abc import Iterable, Mapping

from posttrain.checks import plain
from posttrain.data.pairs.sides import swapped, swapped_with_gaps
from posttrain.log import get_logger


def flip_preferences(dataset, rate: float, seed: int = 0):
    """Swap chosen and rejected in exactly `round(rate * len(dataset))` rows, and say which.

    What belongs to one of the sides, such as its score, goes with it, and a score of one side alone becomes null there,
    with a warning, as of other columns named after one side alone, which stay: see
    `posttrain.data.pairs.sides.swapped`.

    The bool column `flipped` tells whether a row was swapped; where the data set has one already, whether it was
    swapped an odd number of times. Rows keep their order, other columns their values. A pure function of its
    arguments; for one seed, the rows flipped at a lower rate are flipped at a higher one too.

    `dataset`: a `datasets.Dataset`. `rate`: a share in [0, 1), else ValueError.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate} must lie in [0, 1): the share of the rows to swap.")
    if not {"chosen", "rejected"} <= set(dataset.column_names):
        raise ValueError(f"flip_preferences needs the columns 'chosen' and 'rejected'; found {dataset.column_names}.")
    chosen = rows_to_flip(len(dataset), rate, seed)

    for said in lone_columns(dataset.select(sorted(chosen)).with_format(None)):
        get_logger().warning("%s", said)

    def flip(row: dict, index: int) -> dict:
        return flip_row(row, index in chosen)

    return dataset.map(flip, with_indices=True, desc="Flipping labels")


def rows_to_flip(count: int, rate: float, seed: int) -> set[int]:
    """Draw exactly `round(rate * count)` of the numbers below `count`."""
    return set(random.Random(plain(seed)).sample(range(count), count)[: round(rate * count)])


def lone_columns(rows: Iterable[Mapping]) -> list[str]:
    """Tell what swapping these rows does to columns named after one side alone, a sentence each."""
    emptied, left, said = set(), set(), []
    for row in rows:
        found = swapped_with_gaps(row)
        emptied.update(found.emptied)
        left.update(found.left)
    if emptied:
        said.append(
            f"{', '.join(sorted(emptied))}: a score of one side, without the other's, is null in swapped rows: the "
            "score of the answer that stands there is not known."
        )
    if left:
        said.append(
            f"{', '.join(sorted(left))}: named after one side, without a column of the other's, and kept as it is in "
            "swapped rows, where it tells of the answer that is on the other side."
        )
    return said


def flip_row(row: Mapping, swap: bool) -> dict:
    """Return the row with its column `flipped`, and its sides swapped where `swap` says so."""
    return (swapped(row) if swap else dict(row)) | {"flipped": bool(row.get("flipped")) != swap}
