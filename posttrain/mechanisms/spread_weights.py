"""Weights that FSDP spreads over ranks: the part that a rank holds, and the precision they are computed in."""

import contextlib
import dataclasses
import functools
import types

import torch
from accelerate.utils import is_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
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


def give_whole_head(model: nn.Module) -> None:
    """Have a trained output embedding be whole where the fused head multiplies by it, past its module.

    FSDP gathers it with the final norm where accelerate finds one beside the decoder layers, but not around a LoRA, or
    in OPT. There TRL gathers it itself, by a function whose backward leaves out the other ranks' gradients.

    Args:
        model: a causal language model with TRL's fused head, or an adapter around it.
    """
    inner = model.get_base_model() if is_peft_model(model) else model
    before = inner.forward
    # unbound where it can be: a deep copy's forward must run the copy
    plain = getattr(before, "__func__", None) or (lambda self, *args, **kwargs: before(*args, **kwargs))

    # generate() checks its arguments against the signature
    @functools.wraps(type(inner).forward)
    def forward(self, *args, **kwargs):
        if not kwargs.get("fused_lm_head") or not torch.is_grad_enabled():
            return plain(self, *args, **kwargs)
        with _whole_head(self):
            return plain(self, *args, **kwargs)

    inner.forward = types.MethodType(forward, inner)


@contextlib.contextmanager
def _whole_head(model):
    """Put the gathered weights of the output embedding before its own, once the backbone has run."""
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        head = head.modules_to_save[active[0]] if active and not head.disable_adapters else head.original_module
    own = head.__dict__

    def gather(module, args, output):
        for name, value in list(head.named_parameters(recurse=False)):
            if isinstance(value, DTensor) and value.requires_grad:
                # what a module has as a plain attribute is found before its parameters
                own[name] = gathered(value)

    hook = model.base_model.register_forward_hook(gather)
    try:
        yield
    finally:
        hook.remove()
        for name, _ in head.named_parameters(recurse=False):
            own.pop(name, None)


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
