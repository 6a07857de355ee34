"""The product of a LoRA whose own gradients are scaled row by row; forward and input's gradient are LoRA's."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.objectives.row_scales import allora_scale


class _ScaledRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, eta):
        # as LoRA's own two layers, under autocast too
        hidden = F.linear(x, A)
        ctx.save_for_backward(x.to(hidden.dtype), hidden, A, B)
        ctx.eta, ctx.dtype = eta, x.dtype
        return F.linear(hidden, B)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, hidden, A, B = ctx.saved_tensors
        needs_x, needs_A, needs_B, _ = ctx.needs_input_grad
        found = [None, None, None, None]
        # whatever autocast is here, the products are in the dtype that it chose in forward
        with torch.autocast(gradient.device.type, enabled=False):
            scale, dtype, rank = allora_scale(A, B, ctx.eta)[:, None], gradient.dtype, A.size(0)
            rows = gradient.reshape(-1, gradient.size(-1))
            # the gradient is read once, for the input and for A
            both = rows @ torch.cat([B.to(dtype), (scale * B).to(dtype)], dim=1)
            if needs_x:
                found[0] = (both[:, :rank] @ A.to(dtype)).reshape(x.shape).to(ctx.dtype)
            if needs_A:
                found[1] = (both[:, rank:].T @ x.reshape(-1, x.size(-1)).to(dtype)).to(A.dtype)
            if needs_B:
                found[2] = (scale * (rows.T @ hidden.reshape(-1, rank).to(dtype))).to(B.dtype)
        return tuple(found)


def scaled_rows(x: Tensor, A: Tensor, B: Tensor, eta: float) -> Tensor:
    """Compute x A^T B^T, whose gradients of A and B are ALLoRA's.

    With delta the gradient of the output, h = x A^T and S the diagonal matrix of `allora_scale(A, B, eta)` at the
    weights of this forward, a constant:

        grad_B = S delta^T h      grad_A = (delta S B)^T x      grad_x = delta B A

    The last has no S, so that layers below get the gradient that they have without it. All are linear in delta, and S
    does not depend on data: sums over micro-batches, recomputation and averages over ranks are those of one batch.

    Args:
        x: (..., d_in). A: (r, d_in). B: (d_out, r). eta: above 0.

    Returns:
        (..., d_out), bit for bit that of two linear layers.

    Source: arXiv 2410.09692, section 4.2.
    """
    return _ScaledRows.apply(x, A, B, eta)
