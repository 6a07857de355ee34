"""Label noise put in on purpose, to measure how a method bears it."""

import random


def flip_preferences(dataset, rate: float, seed: int = 0):
    """Swap chosen and rejected in exactly `round(rate * len(dataset))` rows, and say which.

    Every pair of columns `chosen...` and `rejected...` is swapped together (chosen_reward with
    rejected_reward, for example). The bool column `flipped` tells whether a row was swapped; where the data
    set has one already, whether it was swapped an odd number of times. Rows keep their order, other columns
    their values. A pure function of its arguments; for one seed, the rows flipped at a lower rate are flipped
    at a higher one too.

    `dataset`: a `datasets.Dataset`. `rate`: a share in [0, 1), else ValueError.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate} must lie in [0, 1): the share of the rows to swap.")
    if not {"chosen", "rejected"} <= set(dataset.column_names):
        raise ValueError(f"flip_preferences needs the columns 'chosen' and 'rejected'; found {dataset.column_names}.")
    order = random.Random(seed).sample(range(len(dataset)), len(dataset))
    swapped = set(order[: round(rate * len(dataset))])
    names = dataset.column_names
    endings = [name.removeprefix("chosen") for name in names if name.startswith("chosen")]
    sides = [("chosen" + ending, "rejected" + ending) for ending in endings if "rejected" + ending in names]

    def flip(row: dict, index: int) -> dict:
        swap = index in swapped
        new = {"flipped": bool(row.get("flipped")) != swap}
        if swap:
            for chosen, rejected in sides:
                new |= {chosen: row[rejected], rejected: row[chosen]}
        return new

    return dataset.map(flip, with_indices=True, desc="Flipping labels")
