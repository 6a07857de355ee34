"""Rows of similar length into the same micro-batch, within one optimiser step."""

import torch
from torch import Tensor


def sort_pairs(batches: list[dict]) -> list[dict]:
    """Deal the pairs of an accumulation window out again by length, as many to each micro-batch as before.

    The optimiser step sees the same pairs, so its gradient is the same to rounding wherever a pair's weight does not
    hang on the micro-batch it is in.

    Args:
        batches: padded on the right. Tensors (2B, L), chosen rows first, and (B,), a number a pair; anything else must
            be the same in all batches of one size, and stays.
    """
    counts = [batch["input_ids"].size(0) // 2 for batch in batches]
    if len(batches) < 2 or max(counts) < 2:
        return batches
    merged = {}
    for key, value in batches[0].items():
        if isinstance(value, Tensor):
            parts = [batch[key] for batch in batches]
            merged[key] = _stack_pairs(parts) if value.dim() == 2 else torch.cat(parts)
    lengths = merged["attention_mask"].sum(dim=2).sum(dim=1)
    order = torch.argsort(lengths, descending=True, stable=True)
    sorted_batches = []
    for batch, own in zip(batches, order.split(counts), strict=True):
        width = int(merged["attention_mask"][own].sum(dim=2).max())
        new = {}
        for key, value in merged.items():
            rows = value[own]
            new[key] = rows[:, :, :width].transpose(0, 1).flatten(0, 1) if value.dim() == 3 else rows
        sorted_batches.append(batch | new)
    return sorted_batches


def _stack_pairs(parts: list[Tensor]) -> Tensor:
    """(2B, L) tensors, chosen rows first, as one (pairs, 2, widest L)."""
    widest = max(part.size(1) for part in parts)
    padded = [torch.nn.functional.pad(part, (0, widest - part.size(1))) for part in parts]
    return torch.cat([part.unflatten(0, (2, -1)).transpose(0, 1) for part in padded])
