"""Gradients of each row of a batch for the matrices of a LoRA, in one backward and with the work of an ordinary one.

For y = h B^T the gradient of row j is the sum over its tokens g_t h_t^T, one product of matrices a row; the gradient of
the whole batch is the same products, added up. So the linear layers of A and B hand out the former and never compute
the latter.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.errors import ConfigError

# values of a row in one tensor, at most: what is done with gradients of rows is then done in few operations, and the
# tensor, which is there before most of its matrices have a gradient, is small beside a row's activations
_TOGETHER = 1 << 18


def wide_enough(parameters: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype that gradients of rows are kept and added up in: fp32, or float64 where a parameter is."""
    return functools.reduce(torch.promote_types, (parameter.dtype for parameter in parameters), torch.float32)


class _Rows:
    """Keeps gradients of rows: those of consecutive matrices behind each other in one tensor, (rows, values).

    It is in fp32, or in float64 where a matrix is.

    Args:
        parameters: the matrices, by name.
        together: values of a row in one tensor, at most, where it has several matrices.
    """

    def __init__(self, parameters: Mapping[str, Tensor], together: int = _TOGETHER) -> None:
        # of each tensor: the names of its matrices, and how many values of a row it has
        self._names: list[list[str]] = []
        self._sizes: list[int] = []
        self._places: dict[str, tuple[int, int, torch.Size]] = {}
        for name, parameter in parameters.items():
            if not self._sizes or self._sizes[-1] + parameter.numel() > together:
                self._names.append([])
                self._sizes.append(0)
            self._places[name] = len(self._sizes) - 1, self._sizes[-1], parameter.shape
            self._names[-1].append(name)
            self._sizes[-1] += parameter.numel()
        self._tensors: dict[int, Tensor] = {}
        self._reached: dict[str, Tensor] = {}
        self._dtype = wide_enough(parameters.values())

    def add(self, name: str, gradient: Tensor, x: Tensor) -> None:
        """Add each row's sum over tokens of g_t h_t^T; `gradient` (rows, tokens, out), `x` (rows, tokens, in)."""
        transposed, known = gradient.transpose(1, 2), self._reached.get(name)
        if known is not None:
            # a layer that runs twice in a forward has the gradients of both
            known.add_(torch.bmm(transposed, x))
            return
        rows = self._reached[name] = self._of(name, gradient)
        if gradient.dtype == rows.dtype:
            torch.bmm(transposed, x, out=rows)
        else:
            rows.copy_(torch.bmm(transposed, x))

    def _of(self, name: str, gradient: Tensor) -> Tensor:
        """Return the place of a matrix in its tensor, which is made where it is the first one of it."""
        number, start, shape = self._places[name]
        if number not in self._tensors:
            self._tensors[number] = gradient.new_empty(len(gradient), self._sizes[number], dtype=self._dtype)
        return self._tensors[number].narrow(1, start, shape.numel()).view(-1, *shape)

    def take(self) -> dict[str, Tensor]:
        """Return the gradients of each matrix that was reached, by name, and drop them."""
        # in the model's order, not in that of backward
        found = {name: self._reached[name] for name in self._places if name in self._reached}
        self.clear()
        return found

    def take_together(self) -> dict[str, Tensor]:
        """Return the tensors of which a matrix was reached, by the name of the first of theirs, and drop them."""
        found = {}
        for number, names in enumerate(self._names):
            if number in self._tensors:
                for name in names:
                    if name not in self._reached:
                        self._of(name, self._tensors[number]).zero_()
                found[names[0]] = self._tensors[number]
        self.clear()
        return found

    def clear(self) -> None:
        self._tensors.clear()
        self._reached.clear()


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
                ctx.taken.add(ctx.name, gradient, x.to(gradient.dtype))
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
        self._taken = _Rows(self.parameters)

    @contextlib.contextmanager
    def collected(self, rows: int) -> Iterator[None]:
        """Enter forward and backward of a batch of so many rows.

        A layer whose input is not (rows, tokens, features), such as an expert that is given the tokens of all rows in
        one list, raises ConfigError in its forward.
        """
        before = {name: layer.__dict__.get("forward") for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            # past the search for parameters and modules in what a module is given
            layer.__dict__["forward"] = _forward(layer, name, rows, self._taken)
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                del layer.__dict__["forward"]
                if before[name] is not None:
                    layer.__dict__["forward"] = before[name]

    def take(self) -> dict[str, Tensor]:
        """Return the gradients of rows since the last call, (rows, *shape of the matrix) by name; drop them.

        They are in fp32, or in float64 where a matrix is. One that no backward has reached is left out: its gradient is
        zero.
        """
        return self._taken.take()

    def take_together(self) -> dict[str, Tensor]:
        """Return what `take` does in fewer tensors: (rows, values) of consecutive matrices, by the name of the first.

        Where some matrices of a tensor were not reached their values are zero; one without any that was is left out.
        """
        return self._taken.take_together()


def _forward(layer: nn.Linear, name: str, rows: int, taken: _Rows):
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
