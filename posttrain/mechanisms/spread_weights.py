"""Weights that FSDP spreads over ranks: the part that a rank holds, and the precision they are computed in."""

import dataclasses

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this rank holds; the tensor itself where it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(weight: torch.Tensor | None) -> torch.Tensor | None:
    """Return a weight whole, for a product outside its module's forward, where FSDP leaves it spread.

    Its gradient is the mean over ranks, as FSDP takes it. All ranks call it.
    """
    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def keep_fp32_outputs(plugin) -> None:
    """Have FSDP2 leave a model's outputs in their own dtype, and add up gradients in fp32.

    accelerate's policy rounds both to the dtype of the forward: log-probabilities of some hundred tokens would lose a
    tenth of a nat, and micro-batches' gradients the same share as under any sum in bf16. Sums in fp32 take 4 bytes a
    parameter on each rank while micro-batches are accumulated.

    Args:
        plugin: accelerate's, of FSDP; one of FSDP1, or without mixed precision, stays as it is.
    """
    policy = plugin.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy) and policy.output_dtype is not None:
        policy = dataclasses.replace(policy, output_dtype=None, reduce_dtype=torch.float32)
        plugin.mixed_precision_policy = policy
