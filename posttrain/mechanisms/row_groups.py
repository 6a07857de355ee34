"""Rows of a batch in groups: the answers to one prompt, each of them chosen or rejected.

TRL's batch of pairs is the special case of two rows a group, all chosen rows before all rejected ones. A method with
several answers of a side, or with groups of unequal size, has its collator put a `RowGroups` into the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

CHOSEN, REJECTED = 1, -1


@dataclass(frozen=True)
class RowGroups:
    """Holds the group and the side of each row of a batch.

    It is kept on the host, so that no operation waits for the device. Below, R is the number of rows, G that of
    groups, C and D those of chosen and of rejected rows.

    Attributes:
        numbers: R numbers of groups, from 0 to G - 1, in the order in which the data set has them.
        signs: R times CHOSEN or REJECTED.

    Raises:
        ValueError: more signs than numbers or fewer, another sign, a group without a row of a side.
    """

    numbers: tuple[int, ...]
    signs: tuple[int, ...]
    _indices: dict = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        if len(self.numbers) != len(self.signs):
            raise ValueError(f"there are {len(self.numbers)} numbers and {len(self.signs)} signs; each row has one")
        if set(self.signs) - {CHOSEN, REJECTED}:
            raise ValueError(f"signs are {sorted(set(self.signs))}; each is {CHOSEN} (chosen) or {REJECTED} (rejected)")
        expected = {(group, sign) for group in range(self.count) for sign in (CHOSEN, REJECTED)}
        if expected != set(zip(self.numbers, self.signs, strict=True)):
            raise ValueError("groups are numbered from 0, and each has a chosen and a rejected row")

    @staticmethod
    @lru_cache(maxsize=64)
    def pairs(count: int) -> "RowGroups":
        """Return the groups of `count` pairs in TRL's order: all chosen rows, then all rejected ones."""
        return RowGroups((*range(count), *range(count)), (CHOSEN,) * count + (REJECTED,) * count)

    @cached_property
    def count(self) -> int:
        """Return the number of groups, G."""
        return max(self.numbers, default=-1) + 1

    @cached_property
    def are_pairs(self) -> bool:
        """Return whether rows are pairs in TRL's order, of which every operation is a view or a plain copy."""
        half = len(self.numbers) // 2
        return (
            self.numbers[:half] == self.numbers[half:] == tuple(range(half)) and self.signs[:half] == (CHOSEN,) * half
        )

    def rows_of(self, sign: int) -> list[int]:
        """Return the rows of a side, in the batch's order."""
        return [row for row, own in enumerate(self.signs) if own == sign]

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Split values of rows (R, ...) into those of chosen rows (C, ...) and of rejected ones (D, ...)."""
        if self.are_pairs:
            return values.chunk(2)
        return values[self._index(values.device, CHOSEN)], values[self._index(values.device, REJECTED)]

    def join(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Undo `split`: values of chosen rows (C, ...) and of rejected ones (D, ...) as values of rows (R, ...)."""
        joined = torch.cat([chosen, rejected])
        return joined if self.are_pairs else joined[self._index(joined.device, "joined")]

    def to_rows(self, values: Tensor) -> Tensor:
        """Give each row its group's value: (G,) to (R,)."""
        return values.repeat(2) if self.are_pairs else values[self._index(values.device, "rows")]

    def mean(self, values: Tensor, sign: int) -> Tensor:
        """Average the values of a side's rows, (C,) or (D,), over the rows of each group: (G,)."""
        if self.are_pairs:
            return values
        members = self._index(values.device, ("members", sign))
        # the last value stands where a group has fewer rows than another; adding by index would have no fixed order
        table = torch.cat([values, values.new_zeros(1)])[members]
        return table.sum(dim=1) / (members < len(values)).sum(dim=1)

    def lists(self, values: Tensor, sign: int) -> list[list[float]]:
        """Return the values of a side's rows, (C,) or (D,), as a list for each group; waits for the device."""
        numbers = iter(values.tolist())
        lists = [[] for _ in range(self.count)]
        for row in self.rows_of(sign):
            lists[self.numbers[row]].append(next(numbers))
        return lists

    def smallest(self, values: Tensor) -> Tensor:
        """Return the smallest value of each group's rows: (R,) of whole numbers to (G,)."""
        if self.are_pairs:
            return torch.minimum(*values.chunk(2))
        largest = values.new_full((1,), torch.iinfo(values.dtype).max)
        return torch.cat([values, largest])[self._index(values.device, ("members", None))].amin(dim=1)

    def select(self, groups: Sequence[int]) -> tuple["RowGroups", list[int]]:
        """Return some groups, in the order given, as a batch of their own, and its rows: chosen ones, then rejected."""
        number = {group: new for new, group in enumerate(groups)}
        rows = [row for sign in (CHOSEN, REJECTED) for group in groups for row in self._members[sign][group]]
        return RowGroups(tuple(number[self.numbers[row]] for row in rows), tuple(self.signs[row] for row in rows)), rows

    @staticmethod
    def merged(parts: Sequence["RowGroups"]) -> "RowGroups":
        """Return the groups of several batches whose rows are put behind each other."""
        groups, signs, before = [], [], 0
        for part in parts:
            groups += [group + before for group in part.numbers]
            signs += part.signs
            before += part.count
        return RowGroups(tuple(groups), tuple(signs))

    @cached_property
    def _members(self) -> dict[int | None, list[list[int]]]:
        """Return the rows of each group, by side; under None those of both."""
        members = {sign: [[] for _ in range(self.count)] for sign in (None, CHOSEN, REJECTED)}
        for row, (group, own) in enumerate(zip(self.numbers, self.signs, strict=True)):
            members[None][group].append(row)
            members[own][group].append(row)
        return members

    def _index(self, device, what) -> Tensor:
        if (what, device) not in self._indices:
            self._indices[what, device] = torch.tensor(self._numbers(what)).to(device, non_blocking=True)
        return self._indices[what, device]

    def _numbers(self, what) -> list:
        if what == "rows":
            return list(self.numbers)
        if what in (CHOSEN, REJECTED):
            return self.rows_of(what)
        order = [*self.rows_of(CHOSEN), *self.rows_of(REJECTED)]
        if what == "joined":
            return sorted(range(len(order)), key=order.__getitem__)
        sign = what[1]
        # rows are counted among those of the side
        rows = range(len(self.numbers)) if sign is None else self.rows_of(sign)
        place = {row: number for number, row in enumerate(rows)}
        members = self._members[sign]
        widest = max(map(len, members))
        return [[place[row] for row in own] + [len(rows)] * (widest - len(own)) for own in members]
