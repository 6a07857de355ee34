"""Means that are right whatever the batch split: sums and counts are kept locally and reduced once per log."""

import torch
from accelerate.utils import gather_object
from torch import Tensor


class MeanMetrics:
    """Keeps running sums and counts by name; `reduce` gives the means over all ranks and starts anew.

    Nothing is moved off the device and no rank waits for another before `reduce`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add every entry of `values`, or those where `mask` (same shape, bool) is True, to the mean of `name`."""
        values = values.detach()
        if mask is None:
            self.add_sum(name, values.sum(dtype=_wide(values)), values.numel())
        else:
            # `where`, not a product: a NaN in a masked place must not spread
            kept = torch.where(mask, values, values.new_zeros(()))
            self.add_sum(name, kept.sum(dtype=_wide(values)), mask.sum())

    def add_sum(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Add `total`, a sum over `count` entries, to the mean of `name`."""
        total = total.detach().to(_wide(total))
        # filled on the device: a number that is copied there waits for it
        count = count.to(total) if isinstance(count, Tensor) else torch.full_like(total, count)
        entry = torch.stack([total, count])
        self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def clear(self) -> None:
        """Drop the sums so far."""
        self._sums = {}

    def reduce(self, accelerator) -> dict[str, tuple[float, float]]:
        """Return (sum, count) of each name over all ranks, in one collective; all ranks must call it."""
        local = {name: entry.tolist() for name, entry in self._sums.items()}
        self._sums = {}
        if accelerator.num_processes == 1:
            return {name: tuple(entry) for name, entry in local.items()}
        # by name, so that a rank that saw no row of a kind does not shift the others' columns
        merged: dict[str, tuple[float, float]] = {}
        for entries in gather_object([local]):
            for name, (total, count) in entries.items():
                known = merged.get(name, (0.0, 0.0))
                merged[name] = (known[0] + total, known[1] + count)
        return merged


def _wide(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64
