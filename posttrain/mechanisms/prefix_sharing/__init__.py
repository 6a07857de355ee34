"""Prefix sharing: one forward for all answers to one prompt.

Chosen and rejected, the answers of a multi-sample row, the rollouts of a group all continue one prompt. Packed into one
row with a mask that hides them from each other, the prompt is computed once and no padding is. The idea is published
as prefix sharing (arXiv 2410.20305).
"""

from posttrain.mechanisms.prefix_sharing.forward import share_prefixes
from posttrain.mechanisms.prefix_sharing.packing import PackedBatch, pack, pack_padded, pack_rows
from posttrain.mechanisms.prefix_sharing.support import (
    attention_cost,
    compare_padded_and_packed,
    factor_of,
    mismatch_reason,
    scales_with_length,
    self_check,
    sliding_window,
    unsupported_reason,
)

__all__ = [
    "PackedBatch",
    "attention_cost",
    "mismatch_reason",
    "unsupported_reason",
    "pack",
    "pack_padded",
    "pack_rows",
    "scales_with_length",
    "self_check",
    "share_prefixes",
    "sliding_window",
    "compare_padded_and_packed",
    "factor_of",
]
