"""The product of a LoRA whose own gradients are scaled row by row; forward and input's gradient are LoRA's.

Its two halves are linear layers that are called as such: an engine that holds weights in parts, as ZeRO-3, gathers each
for its own forward and backward, in an order that a forward without the adapter does not have.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.objectives.row_scales import gram, scale_of


class _Down(torch.autograd.Function):
    """h = x A^T as (2, ..., r) of one storage: the first has the gradient of the input, the second that of A."""

    @staticmethod
    def forward(ctx, x, A):
        # as LoRA's own layer, under autocast too
        hidden = F.linear(x, A)
        ctx.save_for_backward(x.to(hidden.dtype), A)
        ctx.dtype = x.dtype
        return hidden.unsqueeze(0).expand(2, *hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, A = ctx.saved_tensors
        of_x = of_A = None
        # whatever autocast is here, the products are in the dtype that it chose in forward
        with torch.autocast(gradient.device.type, enabled=False):
            plain, scaled = (part.reshape(-1, A.size(0)) for part in gradient)
            if ctx.needs_input_grad[0]:
                of_x = (plain @ A.to(gradient.dtype)).reshape(x.shape).to(ctx.dtype)
            if ctx.needs_input_grad[1]:
                of_A = (scaled.T @ x.reshape(-1, x.size(-1)).to(gradient.dtype)).to(A.dtype)
        return of_x, of_A


class _Up(torch.autograd.Function):
    """y = h B^T, of both parts' h; the gradient of the second has the rows' factors."""

    @staticmethod
    def forward(ctx, both, gram_of_A, B, eta):
        ctx.save_for_backward(both[0], gram_of_A, B)
        ctx.eta = eta
        return F.linear(both[0], B)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden, gram_of_A, B = ctx.saved_tensors
        of_both = of_B = None
        with torch.autocast(gradient.device.type, enabled=False):
            scale, dtype, rank = scale_of(gram_of_A, B, ctx.eta)[:, None], gradient.dtype, B.size(1)
            rows = gradient.reshape(-1, B.size(0))
            if ctx.needs_input_grad[0]:
                # the gradient is read once, for the input and for A
                of_both = rows @ torch.cat([B.to(dtype), (scale * B).to(dtype)], dim=1)
                of_both = of_both.unflatten(1, (2, rank)).transpose(0, 1).reshape(2, *hidden.shape).to(hidden.dtype)
            if ctx.needs_input_grad[2]:
                of_B = (scale * (rows.T @ hidden.reshape(-1, rank).to(dtype))).to(B.dtype)
        return of_both, None, of_B, None


class Down(nn.Linear):
    """A LoRA's A, which gives its input's gradient and its own apart where it is asked to."""

    def forward(self, x: Tensor, apart: bool = False):
        """Return x A^T; `apart`: twice, (2, ..., r), with A A^T, for `Up`."""
        if not apart:
            return super().forward(x)
        return _Down.apply(x, self.weight), gram(self.weight)


class Up(nn.Linear):
    """A LoRA's B, whose gradient has its rows' factors where it is given what `Down` returns."""

    def forward(self, hidden: Tensor, gram_of_A: Tensor | None = None, eta: float | None = None) -> Tensor:
        if gram_of_A is None:
            return super().forward(hidden)
        return _Up.apply(hidden, gram_of_A, self.weight, eta)


def become_scaled(down: nn.Linear, up: nn.Linear) -> None:
    """Make a LoRA's two linear layers such that `scaled_rows` takes them; called as they are, nothing changes."""
    down.__class__, up.__class__ = Down, Up


def trains(layer: nn.Module) -> bool:
    """Return whether a layer has a weight that requires a gradient, without having an engine gather it."""
    held = [value.requires_grad for value in layer.parameters(recurse=False)]
    # an engine may keep a view of its own in the parameter's place
    return any(held) if held else layer.weight.requires_grad


def scaled_rows(x: Tensor, down: Down, up: Up, eta: float) -> Tensor:
    """Compute x A^T B^T, whose gradients of A and B are ALLoRA's.

    With delta the gradient of the output, h = x A^T and S the diagonal matrix of `allora_scale(A, B, eta)` at the
    weights of this forward, a constant:

        grad_B = S delta^T h      grad_A = (delta S B)^T x      grad_x = delta B A

    The last has no S, so that layers below get the gradient that they have without it. All are linear in delta, and S
    does not depend on data: sums over micro-batches, recomputation and averages over ranks are those of one batch.

    Args:
        x: (..., d_in). down: with the weight A (r, d_in). up: with the weight B (d_out, r). eta: above 0.

    Returns:
        (..., d_out), bit for bit that of two linear layers.

    Source: arXiv 2410.09692, section 4.2.
    """
    if not (torch.is_grad_enabled() and (trains(down) or trains(up))):
        return up(down(x))
    both, gram_of_A = down(x, True)
    return up(both, gram_of_A, eta)
