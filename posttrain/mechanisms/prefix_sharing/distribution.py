"""How much goes into one row: a group's answers into blocks, blocks into rows, at the least cost.

A token costs 1, and each position of its row a share of that, the cost of attention.
"""

import heapq
import math

import numpy as np

# more padding than this only where there is no other way
_PADDING_SHARE = 0.1
# numbers of rows of which there are few: 1, 2, 3, 4, 6, 8, 12, ...
_FEW = frozenset(share << power for power in range(24) for share in (1, 2, 3))


def _cost(tokens: int, attention_cost: float) -> float:
    return tokens * (1.0 + attention_cost * tokens)


def split(members: list[int], shared: int, answers: list[int], attention_cost: float) -> list[list[int]]:
    """Split a group into blocks at the least cost: repeating a prompt pays where sharing it makes a row too long.

    Args:
        shared: tokens of the prompt.
        answers: tokens of each member's answer.
    """
    if len(members) == 1:
        return [members]
    total, ends = sum(answers), None
    best, best_cost = (0, len(members)), _cost(shared + total, attention_cost)
    for count in range(2, len(members) + 1):
        tokens = count * shared + total
        # no split into so many rows costs less, nor into more of them
        if tokens > best_cost:
            break
        if ends is None:
            # of the first k answers together
            ends = np.cumsum([0, *answers])
        bounds = np.rint(np.arange(count + 1) * len(members) / count).astype(np.int64)
        cost = sum(_cost(shared + np.diff(ends[bounds]), attention_cost).tolist())
        if cost < best_cost:
            best, best_cost = bounds, cost
    return [members[low:high] for low, high in zip(best, best[1:], strict=False)]


def distribute(
    sizes: list[int], attention_cost: float, multiple: int, few_counts: bool = False
) -> tuple[list[list[int]], int]:
    """Distribute blocks over the number of rows that costs least: few long rows attend more, many pad more.

    Of the ways that pad little, if there are any. Numbers of rows are tried from the least cost that they could have,
    until no other could be better.

    Args:
        sizes: tokens of each block.
        multiple: round the width of the rows up to a multiple of this.
        few_counts: take a power of two of rows, or half as many more, so that batches have few shapes.

    Returns:
        The blocks of each row, and the width.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    descending, total = [sizes[i] for i in order], sum(sizes)

    def cost(count: int, width: int) -> tuple[bool, float, int]:
        width = -(-width // multiple) * multiple
        # of ways that cost the same, that with the fewest rows
        return 1 - total / (count * width) > _PADDING_SHARE, count * _cost(width, attention_cost), count

    least = [cost(count, width) for count, width in enumerate(_least_widths(descending), 1)]
    best, best_cost = 1, (True, math.inf, 0)
    for bound in sorted(least):
        if bound >= best_cost:
            break
        count = bound[-1]
        if few_counts and count not in _FEW:
            continue
        own = cost(count, _longest(descending, count))
        if own < best_cost:
            best, best_cost = count, own
    width, rows = _rows_of_blocks(descending, best)
    bins = [[] for _ in range(best)]
    for block, row in zip(order, rows, strict=True):
        bins[row].append(block)
    return bins, -(-width // multiple) * multiple


def _rows_of_blocks(descending: list[int], count: int) -> tuple[int, list[int]]:
    """Put each block into the emptiest of `count` rows, the first of equals.

    Args:
        descending: tokens of the blocks, the largest first.

    Returns:
        The tokens of the longest row, and the row of each block.
    """
    # tokens and number of a row in one whole number, whose order is that of the pair
    heap = [size * count + row for row, size in enumerate(descending[:count])]
    heapq.heapify(heap)
    rows, replace = [*range(count)], heapq.heapreplace
    for size in descending[count:]:
        rows.append(heap[0] % count)
        replace(heap, heap[0] + size * count)
    return max(heap) // count, rows


def _longest(descending: list[int], count: int) -> int:
    """Return the tokens of the longest row of `_rows_of_blocks`, without saying which block is in which."""
    second = np.array(descending[count:])
    if 0 < len(second) <= count:
        first = np.array(descending[count - len(second) : count])[::-1]
        pairs = first + second
        # no row gets a third block while the emptiest is one with a single block
        if (np.minimum.accumulate(pairs)[:-1] >= first[1:]).all():
            return max(descending[0], int(pairs.max()))
    loads, replace = descending[:count], heapq.heapreplace
    heapq.heapify(loads)
    for size in descending[count:]:
        replace(loads, loads[0] + size)
    return max(loads)


def _least_widths(descending: list[int]) -> list[int]:
    """Return how long the longest of 1, 2, ... rows is at least, however the blocks are distributed.

    Of the k * rows + 1 largest blocks, k + 1 share a row.
    """
    n = len(descending)
    ends = np.cumsum([0, *descending])
    widths = np.maximum(descending[0], -(-ends[-1] // np.arange(1, n + 1)))

    def raise_to(counts, k):
        last = counts * k + 1
        np.maximum.at(widths, counts - 1, ends[last] - ends[last - k - 1])

    # all products of a number of rows and k below n: by k where that is small, and by rows for the rest
    small = math.isqrt(n)
    for k in range(1, small + 1):
        raise_to(np.arange(1, (n - 1) // k + 1), k)
    for count in range(1, (n - 1) // (small + 1) + 1):
        k = np.arange(small + 1, (n - 1) // count + 1)
        raise_to(np.full_like(k, count), k)
    return widths.tolist()
