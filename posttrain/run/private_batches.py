"""Batches of a private run: rows that are drawn by their units, with the units beside them."""

from torch.utils.data import Dataset

from posttrain.errors import ConfigError
from posttrain.privacy.step import RowUnits

# what a batch has beside the trainer's own entries: `RowUnits` of the rows that are forwarded
UNITS = "privacy_units"


class RowsOfUnits(Dataset):
    """Gives rows of a data set by pairs (row, unit), as `PoissonUnits` draws them, with the unit beside each."""

    def __init__(self, rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, places: list[tuple[int, int]]) -> list[tuple[dict, int]]:
        if not places:
            return []
        fetch = getattr(self._rows, "__getitems__", None)
        numbers = [row for row, _ in places]
        rows = fetch(numbers) if fetch else [self._rows[number] for number in numbers]
        return [(row, unit) for row, (_, unit) in zip(rows, places, strict=True)]


class UnitsBeside:
    """Collates pairs (row, unit), and adds the units; without any, a row of two tokens that nothing is learned of.

    Args:
        collator: of the trainer; of a row it may make several, one after the other for all rows, as pairs are.
        blank: a row as the collator takes it, with nothing to learn.
    """

    def __init__(self, collator, blank: dict) -> None:
        self.collator, self.blank = collator, blank

    def __call__(self, pairs: list[tuple[dict, int]]) -> dict:
        batch = self.collator([row for row, _ in pairs] or [self.blank])
        if "row_groups" in batch:
            raise ConfigError(
                "data_collator puts groups of several answers into a batch (row_groups), and batches of a private run "
                "are of pairs, so that each answer's unit is known. Leave data_collator out."
            )
        rows, count = len(batch["input_ids"]), max(len(pairs), 1)
        if rows < count or rows % count:
            raise ConfigError(
                f"data_collator makes {rows} rows of {count}, so that nobody knows which of them belong to whom, and a "
                "private run has to. Leave data_collator out, or give one that makes one row of each (of a pair two)."
            )
        # of pairs all chosen rows come first
        times = rows // count
        batch[UNITS] = RowUnits.of([unit for _, unit in pairs] * times)
        return batch


def is_nobodys(batch: dict) -> bool:
    """Return whether what a batch of a private run has is there for its shape alone."""
    return UNITS in batch and not batch[UNITS].numbers
