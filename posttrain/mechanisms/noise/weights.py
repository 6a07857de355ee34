"""Noise on the frozen weights of linear layers in the forward that is trained, drawn again in its backward.

A layer that takes it asks a `WeightNoise` whether there is noise at this moment. The weight with its noise is not kept.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.mechanisms.noise import draws
from posttrain.mechanisms.noise.controller import innermost

KINDS = ("gaussian", "uniform")


class WeightNoise:
    """Says whether weights have noise at this moment, and seeds it.

    There is noise where a training step is under way and gradients were enabled as the innermost model was entered, or
    are enabled here: the latter in a recomputation, which may come after another forward, of a reference for one. A
    step's seed is of the run, the optimiser step and the layer, so that all micro-batches and ranks have one draw.

    Args:
        seed: the run's.
        kind: gaussian, of half a layer's step as its standard deviation; or uniform, within half a step.
    """

    def __init__(self, seed: int, kind: str = "gaussian") -> None:
        self.seed, self.kind, self.step = seed, kind, 0
        self._under_way, self._entered = False, False
        self._expected: dict[int, tuple[float, float]] = {}
        # of the noise drawn and of the columns which have it, by layer; measured only where it is asked for
        self.measured: dict[int, Tensor] | None = None

    @contextlib.contextmanager
    def during_step(self, model: nn.Module, step: int):
        """Be under way: a forward and backward of a model, `step` optimiser steps having been taken."""
        self.step, self._under_way, self._entered = step, True, False
        hook = innermost(model).register_forward_pre_hook(self._enter)
        try:
            yield
        finally:
            hook.remove()
            self._under_way = False

    def _enter(self, module, args) -> None:
        self._entered = torch.is_grad_enabled()

    @property
    def is_on(self) -> bool:
        """Whether a layer that is forwarded now has noise."""
        return self._under_way and (self._entered or torch.is_grad_enabled())

    def seed_of(self, number: int) -> int:
        """Return the seed of a layer's draw in this step."""
        return int(draws.run_key(self.seed, self.step, number)) & ((1 << 63) - 1)

    def note(self, rows: "RowNoise") -> None:
        """Note that a layer's noise is drawn."""
        self._expected[rows.number] = rows.squares(self.kind)

    def take_ratio(self) -> float:
        """Return the expected norm of the noise over that of the columns with it, of layers drawn since last asked."""
        found, self._expected = self._expected.values(), {}
        noise, weights = (sum(part) for part in zip(*found, strict=True)) if found else (0.0, 1.0)
        return (noise / max(weights, 1e-30)) ** 0.5


class RowNoise:
    """The noise of one weight (O, N): how large it is in each row, and which columns have none.

    Args:
        step: (O,), delta, in fp32. columns: (K,), numbers of the columns without noise.
        number: of the layer in its model. weight: the weight itself.
    """

    def __init__(self, step: Tensor, columns: Tensor, number: int, weight: Tensor) -> None:
        self.step, self.columns, self.number = step, columns, number
        noise = step.double().square().sum() * (weight.size(1) - len(columns))
        weights = weight.double().square().sum(dim=0).index_fill(0, columns.to(weight.device), 0.0)
        self._squares = noise.item(), weights.sum().item()

    def squares(self, kind: str) -> tuple[float, float]:
        """Return the expected square of the noise, and that of the weights in the columns which have it."""
        noise, weights = self._squares
        return noise / (4 if kind == "gaussian" else 12), weights

    def draw(self, weight: Tensor, kind: str, seed: int) -> Tensor:
        """Return the noise (O, N) of a weight, in its dtype."""
        if self.step.device != weight.device:
            self.step, self.columns = self.step.to(weight.device), self.columns.to(weight.device)
        generator = torch.Generator(weight.device).manual_seed(seed)
        made = torch.empty_like(weight)
        if kind == "gaussian":
            made.normal_(0.0, 0.5, generator=generator)
        else:
            made.uniform_(-0.5, 0.5, generator=generator)
        return made.mul_(self.step[:, None]).index_fill_(1, self.columns, 0.0)


@contextlib.contextmanager
def added_to(module: nn.Linear, rows: RowNoise, noise: WeightNoise):
    """Give forwards of a linear layer inside noise on its weight, within the layer's own forward.

    Its owner alone may read the weight: ZeRO-3 gathers it for that forward, and for the layer's backward.
    """
    before = module.__dict__.get("forward")
    module.forward = functools.partial(_forward, module, rows, noise)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _forward(module: nn.Linear, rows: RowNoise, noise: WeightNoise, x: Tensor) -> Tensor:
    noise.note(rows)
    result = _NoisyProduct.apply(x, module, rows, noise.kind, noise.seed_of(rows.number), noise.measured)
    return result if module.bias is None else result + module.bias


class _NoisyProduct(torch.autograd.Function):
    """x (W + N)^T with a frozen W; keeps what N is drawn by, and neither x nor a weight."""

    @staticmethod
    def forward(ctx, x, module, rows, kind, seed, measured):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else module.weight.dtype
        ctx.module, ctx.rows, ctx.kind, ctx.seed, ctx.dtype, ctx.given = module, rows, kind, seed, dtype, x.dtype
        weight = module.weight.detach()
        drawn = rows.draw(weight, kind, seed)
        if measured is not None:
            noisy = weight.index_fill(1, rows.columns, 0.0)
            measured[rows.number] = torch.stack([part.float().square().sum() for part in (drawn, noisy)])
        return F.linear(x.to(dtype), drawn.add_(weight).to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        weight = ctx.module.weight.detach()
        noisy = ctx.rows.draw(weight, ctx.kind, ctx.seed).add_(weight).to(ctx.dtype)
        return (gradient.to(ctx.dtype) @ noisy).to(ctx.given), None, None, None, None, None
