"""Gradients of each row of a batch for the matrices of a LoRA, in one backward and with the work of an ordinary one.

For y = h B^T the gradient of row j is the sum over its tokens g_t h_t^T, one product of matrices a row; the gradient of
the whole batch is the same products, added up. So the linear layers of A and B hand out the former and never compute
the latter.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.errors import ConfigError


class _RowLinear(torch.autograd.Function):
    """y = x W^T whose backward hands out the gradient of W of each row, and gives W none."""

    @staticmethod
    def forward(ctx, x, weight, taken, name):
        # by name: checkpointing that is not reentrant gives backward a copy of a saved weight
        ctx.taken, ctx.name, ctx.dtype = taken, name, x.dtype
        y = F.linear(x, weight)
        # under autocast in the dtype that it chose, which backward then has as well
        ctx.save_for_backward(x.to(y.dtype), weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x = None
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_x = (gradient @ weight.to(gradient.dtype)).to(ctx.dtype)
            if ctx.needs_input_grad[1]:
                rows = torch.bmm(gradient.transpose(1, 2), x.to(gradient.dtype)).float()
                known = ctx.taken.get(ctx.name)
                # a layer that runs twice in a forward has the gradients of both
                ctx.taken[ctx.name] = rows if known is None else known.add_(rows)
        return of_x, None, None, None


class RowGradients:
    """Takes the gradients of each row for the trained matrices of a model's LoRA.

    Inside `collected` the linear layers of A and B keep the gradients of rows, and their weights get none; outside it
    the model is as it was. Layers on any base take part, quantised ones and GPT-2's Conv1D among them, as the base is
    frozen. Recomputation of activations, autocast and layers that run several times in a forward change nothing.

    Args:
        model: with a LoRA whose matrices are all that is trained.

    Attributes:
        parameters: the trained matrices, by name; in the model's order.

    Raises:
        ConfigError: something else is trained, whose gradients of rows would be missing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = dict(_trained_layers(model))
        self.parameters = {name: layer.weight for name, layer in self._layers.items()}
        _check_all_known(model, self.parameters)
        self._taken: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def collected(self, rows: int) -> Iterator[None]:
        """Enter forward and backward of a batch of so many rows.

        A layer whose input is not (rows, tokens, features), such as an expert that is given the tokens of all rows in
        one list, raises ConfigError in its forward.
        """
        before = {name: layer.__dict__.get("forward") for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            layer.forward = _forward(layer, name, rows, self._taken)
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                del layer.forward
                if before[name] is not None:
                    layer.forward = before[name]

    def take(self) -> dict[str, Tensor]:
        """Return the gradients of rows since the last call, (rows, *shape of the matrix) in fp32, by name; drop them.

        A matrix that no backward has reached is left out: its gradient is zero.
        """
        # in the model's order, not in that of backward
        found = {name: self._taken[name] for name in self.parameters if name in self._taken}
        self._taken.clear()
        return found


def _forward(layer: nn.Linear, name: str, rows: int, taken: dict[str, Tensor]):
    def forward(x: Tensor) -> Tensor:
        if x.dim() != 3 or x.size(0) != rows:
            raise ConfigError(
                f"{name} is given {tuple(x.shape)} for a batch of {rows} rows, where (rows, tokens, features) was "
                "expected: which tokens belong to which row is not known there, as in experts of a mixture. Leave such "
                "modules out of lora_target_modules."
            )
        return _RowLinear.apply(x, layer.weight, taken, name)

    return forward


def _trained_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of A and B that are trained, by the names of their weights."""
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for kind in ("lora_A", "lora_B"):
            for adapter, layer in getattr(module, kind).items():
                if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
                    yield f"{path}.{kind}.{adapter}.weight", layer


def _check_all_known(model: nn.Module, known: dict[str, nn.Parameter]) -> None:
    """Refuse what is trained beside matrices of linear layers, and matrices that several layers share."""
    if not known:
        raise ConfigError(
            "the model has no LoRA on linear layers that is trained, which gradients of rows are taken of. Pass a "
            "LoraConfig as peft_config (`use_peft: true` in a recipe)."
        )
    shared = len(known) - len({id(parameter) for parameter in known.values()})
    if shared:
        raise ConfigError(
            f"{shared} of the adapter's {len(known)} matrices are shared between layers, so that gradients of rows "
            "would be counted apart which belong together. Give each layer its own."
        )
    ours = {id(parameter) for parameter in known.values()}
    others = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in ours
    ]
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise ConfigError(
            f"{shown} would be trained as well, and gradients of rows are taken of LoRA's A and B on linear layers "
            "alone. Leave out modules_to_save, biases, new tokens, DoRA and adapters on embeddings and convolutions."
        )
    for path, module in model.named_modules():
        variants = getattr(module, "lora_variant", None) if isinstance(module, LoraLayer) else None
        if variants:
            kind = type(next(iter(variants.values()))).__name__
            raise ConfigError(
                f"{path} has an adapter of the kind {kind}, which uses its matrices in another way than x A^T B^T. Use "
                "plain LoRA."
            )
