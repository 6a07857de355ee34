"""Statistics over a whole optimiser step: all micro-batches of the accumulation window, on all ranks.

A method that weighs a row by its batch means the batch of the optimiser step. `Trainer.get_batch_samples` hands over
this rank's share of it before the first backward, so the weights can be fixed there, once, and each micro-batch then
trains on its weighted rows. Data parallel training averages gradients over ranks and the Trainer divides by the
number of micro-batches; `Window.rescale` is the factor that takes both divisions back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Describes the extent of one optimiser step.

    Attributes:
        micro_batches: micro-batches of this step on this rank.
        world_size: data parallel ranks.
        rows: rows of data in the step, over all micro-batches and ranks, repeats not counted.
    """

    micro_batches: int
    world_size: int
    rows: int

    def rescale(self, batch_rows: int) -> float:
        """Rescale a micro-batch mean to the mean over the optimiser step; returns the factor.

        It is the one on `sum_i w_i x_i / batch_rows` that makes the step's gradient `sum_i w_i x_i / rows`.

        Exactly 1.0 where all micro-batches of the window are full, so that a plain mean stays bit-equal to the parent
        trainer's.
        """
        return batch_rows * self.world_size * self.micro_batches / self.rows


def real_rows(accelerator, batch_rows: int) -> int:
    """Count the first rows of the batch just drawn that are data; the others only fill up an epoch's last step.

    With several ranks, accelerate completes the last round of an epoch by repeating rows from its start. The
    concatenation over ranks then holds `remainder` rows of data first, the same fact that `gather_for_metrics` uses.
    """
    state = accelerator.gradient_state
    if not state.in_dataloader or not state.end_of_dataloader or state.remainder <= 0:
        return batch_rows
    return min(max(state.remainder - accelerator.process_index * batch_rows, 0), batch_rows)


def count_rows(accelerator, local_rows: int) -> int:
    """Sum `local_rows` over ranks."""
    if accelerator.num_processes == 1:
        return local_rows
    return int(accelerator.reduce(torch.tensor(local_rows, device=accelerator.device), reduction="sum").item())


def on_host(batches: list[dict], names: tuple[str, ...]) -> list[dict]:
    """Return tensors of whole numbers of a step's micro-batches on the host, by name; waits for the device once."""
    tensors = [batch[name] for batch in batches for name in names]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        sent = tensors
    else:
        flat = torch.cat([tensor.flatten().long() for tensor in tensors]).cpu()
        sent = [
            part.view(tensor.shape)
            for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True)
        ]
    found = iter(sent)
    return [{name: next(found) for name in names} for _ in batches]


def gather_rows(accelerator, values: Tensor, real: Tensor | None = None) -> tuple[Tensor, slice]:
    """Gather one number per row from all ranks.

    Args:
        values: (R,) this rank's numbers, over all its micro-batches in order. Ranks may differ in R.
        real: (R,) bool, False for a row that only fills up; such rows are left out of the result, which waits for the
            device. None where all rows count.

    Returns:
        all_values: (N,) the numbers of all real rows, in rank order, the same on every rank.
        own: the slice of `all_values` that holds this rank's real rows.
    """
    values = values if real is None else values[real]
    if accelerator.num_processes == 1:
        return values, slice(0, values.numel())
    counts = accelerator.gather(torch.tensor([values.numel()], device=values.device)).tolist()
    padded = values.new_zeros(max(counts))
    padded[: values.numel()] = values
    # `gather`, never `gather_for_metrics`: that one drops entries at the end of an epoch
    table = accelerator.gather(padded).view(len(counts), -1)
    start = sum(counts[: accelerator.process_index])
    all_values = torch.cat([row[:count] for row, count in zip(table, counts, strict=True)])
    return all_values, slice(start, start + values.numel())
