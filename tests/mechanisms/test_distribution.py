"""Blocks of tokens distributed over rows: the least cost, found without trying all ways."""

import random

import numpy as np
import pytest
import torch

from posttrain.mechanisms.prefix_sharing import distribution, pack_padded


def tried_all(sizes, attention_cost, multiple, counts=None):
    """Every number of rows, each block into the emptiest row: what `distribute` must come to."""
    best, best_cost = None, (True, float("inf"))
    for count in counts or range(1, len(sizes) + 1):
        loads, rows = [0] * count, [[] for _ in range(count)]
        for block in sorted(range(len(sizes)), key=lambda block: (-sizes[block], block)):
            row = loads.index(min(loads))
            loads[row] += sizes[block]
            rows[row].append(block)
        width = -(-max(loads) // multiple) * multiple
        cost = (1 - sum(sizes) / (count * width) > 0.1, count * (width * (1.0 + attention_cost * width)))
        if cost < best_cost:
            best, best_cost = (rows, width), cost
    return best


@pytest.mark.parametrize("attention_cost", [0, 3e-5, 3e-4, 0.01, 3])
def test_the_rows_are_those_of_trying_every_number_of_them(attention_cost):
    draw = random.Random(0)
    for _ in range(60):
        largest, multiple = draw.choice([1, 3, 30, 300, 3000]), draw.choice([1, 8, 128])
        sizes = [draw.randint(1, largest) for _ in range(draw.randint(1, 25))]
        sizes[0] *= draw.choice([1, 10])
        found = distribution.distribute(sizes, attention_cost, multiple)
        assert found == tried_all(sizes, attention_cost, multiple), (sizes, multiple)


def test_few_numbers_of_rows_are_the_cheapest_of_those_that_there_are():
    draw, seen = random.Random(0), set()
    for _ in range(60):
        sizes = [draw.randint(1, 300) for _ in range(draw.randint(1, 25))]
        counts = [count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24) if count <= len(sizes)]
        found = distribution.distribute(sizes, 3e-4, 128, few_counts=True)
        assert found == tried_all(sizes, 3e-4, 128, counts), sizes
        seen.add(len(found[0]))
    assert len(seen) > 3


def test_wide_steps_and_few_numbers_of_rows_make_few_shapes():
    """Lengths like those of short chats: 16 pairs a batch, an answer a block where prompts are not shared."""
    draw = random.Random(0)
    batches = [[min(int(draw.lognormvariate(5.2, 0.7)) + 20, 1024) for _ in range(16)] for _ in range(100)]

    def shapes(multiple, few_counts):
        made = [distribution.distribute(sizes, 1e-4, multiple, few_counts) for sizes in batches]
        padding = 1 - sum(map(sum, batches)) / sum(len(rows) * width for rows, width in made)
        return len({(len(rows), width) for rows, width in made}), padding

    many, few = shapes(8, False), shapes(128, True)
    assert few[0] < many[0] / 2 and few[1] < 0.12


def test_no_row_is_shorter_than_the_bound_says():
    draw = random.Random(0)
    for _ in range(50):
        descending = sorted((draw.randint(1, 100) for _ in range(draw.randint(1, 30))), reverse=True)
        for count, least in enumerate(distribution._least_widths(descending), 1):
            width, rows = distribution._rows_of_blocks(descending, count)
            assert least <= width == distribution._longest(descending, count)
            assert width == np.bincount(rows, weights=descending).max()


def test_a_group_is_split_at_the_least_cost():
    draw = random.Random(0)
    for _ in range(100):
        members, shared, attention_cost = draw.randint(1, 20), draw.randint(1, 50), draw.choice([0, 3e-4, 0.02, 1])
        answers = [draw.randint(1, 60) for _ in range(members)]
        costs = []
        for count in range(1, members + 1):
            bounds = [round(k * members / count) for k in range(count + 1)]
            tokens = [shared + sum(answers[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]
            costs.append(sum(own * (1 + attention_cost * own) for own in tokens))
        blocks = distribution.split(list(range(members)), shared, answers, attention_cost)
        assert sum(blocks, []) == list(range(members))
        assert len(blocks) == costs.index(min(costs)) + 1


def test_pairs_that_plainly_share_a_row_are_split_without_a_search(monkeypatch):
    costs, cost = [], distribution._cost
    monkeypatch.setattr(distribution, "_cost", lambda *args: costs.append(args) or cost(*args))
    # a repeated prompt of 200 tokens costs more than the longer row of 300
    for first in range(1, 257):
        assert distribution.split([first, 0], 200, [50, 50], 3e-4) == [[first, 0]]
    assert len(costs) == 256
    # where it pays, it is found
    assert distribution.split([1, 0], 20, [5000, 5000], 3e-4) == [[1], [0]] and len(costs) == 258


@pytest.mark.parametrize("shape", ["one length", "any length", "one prompt"])
def test_a_thousand_rows_are_packed_without_trying_every_number_of_packed_rows(shape, monkeypatch):
    tried, longest_row = [], distribution._longest
    monkeypatch.setattr(distribution, "_longest", lambda *args: tried.append(args[1]) or longest_row(*args))
    draw = torch.Generator().manual_seed(0)
    rows, longest = 1024, 64
    ids = torch.randint(1, 50000, (rows, longest), generator=draw)
    if shape == "one prompt":
        ids[:, :16] = 7
    lengths = torch.randint(20, longest, (rows, 1), generator=draw) if shape == "any length" else longest
    mask = (torch.arange(longest) < lengths).long().expand(rows, -1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :16] = -100
    packed = pack_padded(ids, mask, labels)
    kept = labels[:, 1:] != -100
    assert torch.equal(packed.unpack(packed.labels), labels[:, 1:].masked_fill(~kept, 0))
    # of the 1,024 numbers of rows
    assert 1 <= len(tried) < 200
