"""Rows of similar length into the same micro-batch, within one optimiser step."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from posttrain.mechanisms.row_groups import CHOSEN, REJECTED, RowGroups


def sort_groups(
    batches: list[dict], groups: Sequence[RowGroups], sides: Mapping[str, int], lengths: Sequence[Sequence[int]]
) -> list[dict]:
    """Sort the groups of an accumulation window by length into its micro-batches, as many in each as before.

    The optimiser step sees the same groups, so its gradient is the same to rounding wherever a group's weight does not
    hang on the micro-batch it is in.

    Args:
        batches: padded on the right. Tensors (R, L) of rows, and vectors: a number a group, or a row of one side;
            anything else must be the same in all batches of one size, and stays.
        groups: of each batch; a `RowGroups` in a batch is replaced.
        sides: names of the vectors that have a number for each row of a side, and its sign.
        lengths: tokens of each row of each batch, known on the host, so that nothing waits for the device.
    """
    counts = [own.count for own in groups]
    if len(batches) < 2 or max(counts) < 2:
        return batches
    merged, values = RowGroups.merged(groups), {}
    for key, value in batches[0].items():
        if isinstance(value, Tensor):
            parts = [batch[key] for batch in batches]
            values[key] = _stack(parts) if value.dim() == 2 else torch.cat(parts)
    row_lengths = [*itertools.chain(*lengths)]
    totals = [0] * merged.count
    for number, length in zip(merged.numbers, row_lengths, strict=True):
        totals[number] += length
    order = sorted(range(merged.count), key=lambda number: -totals[number])
    place = {sign: {row: at for at, row in enumerate(merged.rows_of(sign))} for sign in (CHOSEN, REJECTED)}
    sorted_batches, device, start = [], values["attention_mask"].device, 0
    for batch, count in zip(batches, counts, strict=True):
        own = order[start : start + count]
        start += count
        selected, rows = merged.select(own)
        width = max(row_lengths[row] for row in rows)
        row_index, group_index = _index(rows, device), _index(own, device)
        side_index = {sign: _index([at[row] for row in rows if row in at], device) for sign, at in place.items()}
        new = {}
        for key, value in values.items():
            index = row_index if value.dim() == 2 else side_index[sides[key]] if key in sides else group_index
            new[key] = value[index, :width] if value.dim() == 2 else value[index]
        new |= {key: selected for key, value in batch.items() if isinstance(value, RowGroups)}
        sorted_batches.append(batch | new)
    return sorted_batches


def _index(places: list[int], device) -> Tensor:
    return torch.tensor(places).to(device, non_blocking=True)


def _stack(parts: list[Tensor]) -> Tensor:
    """Stack (R, L) tensors, each padded to the widest."""
    widest = max(part.size(1) for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, widest - part.size(1))) for part in parts])
