"""Groups of chosen and rejected rows: pairs as in TRL's batches, and groups of unequal size."""

import pytest
import torch

from posttrain.mechanisms.length_sorting import sort_groups
from posttrain.mechanisms.row_groups import CHOSEN, REJECTED, RowGroups

# a group of one chosen and two rejected rows, and one of two and one, in no order
UNEQUAL = RowGroups((0, 1, 0, 1, 1, 0), (REJECTED, CHOSEN, CHOSEN, REJECTED, CHOSEN, REJECTED))


def test_pairs_are_the_rows_that_upstream_chunks():
    values, groups = torch.randn(6, 2), RowGroups.pairs(3)
    chosen, rejected = groups.split(values)
    assert torch.equal(chosen, values.chunk(2)[0]) and torch.equal(rejected, values.chunk(2)[1])
    assert torch.equal(groups.join(chosen, rejected), values)
    assert groups.mean(chosen, CHOSEN) is chosen and groups.numbers == (0, 1, 2, 0, 1, 2)
    assert groups.smallest(torch.tensor([3, 1, 4, 1, 5, 9])).tolist() == [1, 1, 4]
    assert groups.to_rows(torch.tensor([7, 8, 9])).tolist() == [7, 8, 9, 7, 8, 9]


def test_rows_of_unequal_groups_find_their_group_and_side():
    rows = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], requires_grad=True)
    chosen, rejected = UNEQUAL.split(rows)
    assert chosen.tolist() == [2, 4, 16] and rejected.tolist() == [1, 8, 32]
    assert torch.equal(UNEQUAL.join(chosen, rejected), rows)
    assert UNEQUAL.mean(chosen, CHOSEN).tolist() == [4, 9] and UNEQUAL.mean(rejected, REJECTED).tolist() == [16.5, 8]
    assert UNEQUAL.lists(rejected, REJECTED) == [[1, 32], [8]]
    assert UNEQUAL.to_rows(torch.tensor([True, False])).tolist() == [True, False, True, False, False, True]
    assert UNEQUAL.smallest(torch.tensor([5, 2, 7, 3, 9, 6])).tolist() == [5, 2]
    (UNEQUAL.mean(chosen, CHOSEN) - UNEQUAL.mean(rejected, REJECTED)).sum().backward()
    assert rows.grad.tolist() == [-0.5, 0.5, 1, -1, 0.5, -0.5]


def test_groups_written_as_pairs_in_another_order_give_the_same_values():
    pairs, other = RowGroups.pairs(2), RowGroups((1, 0, 1, 0), (CHOSEN, REJECTED, REJECTED, CHOSEN))
    rows = torch.tensor([3.0, 1.0, 2.0, 5.0])
    in_order = rows[[3, 0, 1, 2]]
    assert pairs.are_pairs and not other.are_pairs
    for sign, side, plain in zip((CHOSEN, REJECTED), other.split(rows), pairs.split(in_order), strict=True):
        assert torch.equal(other.mean(side, sign), pairs.mean(plain, sign))


@pytest.mark.parametrize(
    ("numbers", "signs", "what"),
    [
        ((0, 0, 1), (1, -1, 1), "has a chosen and a rejected row"),
        ((1, 1), (1, -1), "numbered from 0"),
        ((0, 0), (1, 0), "each is 1"),
        ((0, 0), (1,), "2 numbers and 1 signs"),
    ],
)
def test_groups_without_a_side_a_number_or_a_sign_are_refused(numbers, signs, what):
    with pytest.raises(ValueError, match=what):
        RowGroups(numbers, signs)


def test_sorting_keeps_every_row_and_number_with_its_group():
    generator = torch.Generator().manual_seed(0)
    batches, groups, name = [], [], 0
    for parts in (UNEQUAL, RowGroups.pairs(2), UNEQUAL):
        own = torch.arange(name, name + parts.count) + 1
        name += parts.count
        lengths = torch.randint(2, 9, (len(parts.numbers),), generator=generator)
        mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
        rows = parts.to_rows(own)
        chosen, rejected = parts.split(rows)
        batches.append(
            {"input_ids": mask * rows.unsqueeze(1), "attention_mask": mask, "flip_rate": own.float()}
            | {"ref_chosen_logps": chosen.float(), "ref_rejected_logps": -rejected.float(), "row_groups": parts}
        )
        groups.append(parts)
    total = {}
    for batch, parts in zip(batches, groups, strict=True):
        for row, number in zip(batch["attention_mask"].sum(dim=1).tolist(), parts.numbers, strict=True):
            name = int(batch["flip_rate"][number])
            total[name] = total.get(name, 0) + row
    sides = {"ref_chosen_logps": CHOSEN, "ref_rejected_logps": REJECTED}
    after, seen = (
        sort_groups(batches, groups, sides, [batch["attention_mask"].sum(dim=1).tolist() for batch in batches]),
        [],
    )
    for batch in after:
        parts = batch["row_groups"]
        names = batch["flip_rate"]
        assert torch.equal(batch["input_ids"].amax(dim=1).float(), parts.to_rows(names))
        assert torch.equal(parts.mean(batch["ref_chosen_logps"], CHOSEN), names)
        assert torch.equal(parts.mean(batch["ref_rejected_logps"], REJECTED), -names)
        assert batch["attention_mask"].sum(dim=1).max() == batch["input_ids"].size(1)
        seen += names.int().tolist()
    assert sorted(seen) == sorted(total) and [total[name] for name in seen] == sorted(total.values(), reverse=True)


class Counted(tuple):
    """Counts how often it is read through."""

    reads = 0

    def __iter__(self):
        Counted.reads += 1
        return super().__iter__()


def test_groups_are_found_in_one_pass_however_many_are_selected(monkeypatch):
    monkeypatch.setattr(Counted, "reads", 0)
    pairs = RowGroups.pairs(50)
    groups = RowGroups(Counted(pairs.numbers), Counted(pairs.signs))
    for group in range(50):
        selected, rows = groups.select([group])
        assert (selected.numbers, rows) == ((0, 0), [group, 50 + group])
    assert 0 < Counted.reads < 10
