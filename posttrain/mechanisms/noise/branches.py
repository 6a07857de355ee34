"""Several copies of a batch in one forward, one behind the other as rows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from posttrain.errors import ConfigError

# of a row each; or (1, T) for all of them
_OF_ROWS = ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids", "seq_idx", "completion_mask")
# where the sequences of a row that holds several begin, for attention kernels that read the rows as one
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")
# the same for every copy
_SHARED = ("max_length_q", "max_length_k", "use_cache", "output_router_logits", "fused_lm_head")


def repeated(batch: Mapping, times: int) -> dict:
    """Return a batch whose rows come `times` times over: row i of copy k is row k * B + i.

    Rows that hold several sequences stay rows of their own, so that no position and no token is moved.

    Args:
        batch: what the model is given: (B, T) tensors, bounds of sequences (S + 1,), flags.

    Raises ConfigError for a tensor of which it is not known how it is repeated.
    """
    rows, width = batch["input_ids"].shape
    made = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or name in _SHARED:
            made[name] = value
        elif name in _BOUNDS:
            # each copy begins where the one before ends
            made[name] = torch.cat([value] + [value[1:] + rows * width * copy for copy in range(1, times)])
        elif name in _OF_ROWS and value.dim() == 2 and len(value) in (1, rows):
            made[name] = value.expand(rows, -1).repeat(times, 1)
        else:
            raise ConfigError(
                f"the batch holds {name} {tuple(value.shape)}, and this kind of noise forwards each row several times, "
                "of which it is not known how they would share it. Use TRL's collator, or `embedding_noise: neftune`."
            )
    return made
