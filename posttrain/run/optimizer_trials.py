"""Optimizers tried out on small tensors before a run: steps, saved state, and parts of a matrix beside the whole."""

import contextlib
import copy
import io
import math
import warnings
from typing import NamedTuple

import torch
from transformers.trainer_pt_utils import safe_globals

from posttrain.errors import ConfigError
from posttrain.log import get_logger

# of a tensor that is cut, as an engine cuts it: at no row
_SHAPE, _CUT, _STEPS = (4, 6), 10, 16


class Chosen(NamedTuple):
    """An optimizer that a trainer builds by itself.

    Attributes:
        name: as settings, card and identity have it.
        kind: the class. settings: its constructor's, beside parameters, rate and weight decay.
    """

    name: str
    kind: type
    settings: dict[str, object]


def try_out(chosen: Chosen, learning_rate: float, weight_decay: float, saves: bool = True) -> None:
    """Build an optimizer on a matrix and a vector, and on the matrix alone, and take two steps of each.

    `saves`: whether checkpoints hold its state. That must be of tensors and plain values; where it is not all that the
    next step depends on, a warning says so. Draws no random number of the run.

    Raises ConfigError with what the class says.
    """
    for shapes in ((_SHAPE, (3,)), (_SHAPE,)):
        with _quietly(), torch.random.fork_rng(devices=[]):
            parameters = [_matrix(*shape) for shape in shapes]
            try:
                optimizer = _built(chosen, parameters, learning_rate, weight_decay)
                for number in range(2):
                    _step(optimizer, number)
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
                given = f" with optim_args {chosen.settings}" if chosen.settings else ""
                raise ConfigError(f"optim {chosen.name} cannot take a step{given}: {told}") from error
            goes_on = not saves or _goes_on(chosen, optimizer, parameters, learning_rate, weight_decay)
    if not goes_on:
        get_logger().warning(
            "optim %s keeps what its next step depends on outside its state: a run that goes on from a checkpoint will "
            "not be the one that was never interrupted",
            chosen.name,
        )


def _goes_on(chosen: Chosen, optimizer, parameters: list, learning_rate: float, weight_decay: float) -> bool:
    """Save and load an optimizer's state as a checkpoint does, and tell whether the next step is the same."""
    copies, file = [torch.nn.Parameter(one.detach().clone()) for one in parameters], io.BytesIO()
    twin = _built(chosen, copies, learning_rate, weight_decay)
    try:
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        with safe_globals():
            twin.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:
        raise ConfigError(
            f"optim {chosen.name} has a state that is not of tensors and plain values ({type(error).__name__}), so no "
            "checkpoint could be loaded. Choose another, or set `save_only_model: true`."
        ) from error
    for one in (optimizer, twin):
        torch.manual_seed(0)
        _step(one, 2)
    return all(torch.equal(one, other) for one, other in zip(parameters, copies, strict=True))


def is_elementwise(chosen: Chosen, learning_rate: float = 0.01, weight_decay: float = 0.01) -> bool:
    """Tell whether a matrix that is cut into flat parts, an optimizer each, moves as the whole one does.

    No proof: a rule that reads the whole matrix at a later step alone passes. It is asked of names in `SHARDABLE`.
    """
    rate = learning_rate or 0.01
    with _quietly(), torch.random.fork_rng(devices=[]):
        whole = _matrix(*_SHAPE)
        parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().flatten().split(_CUT)]
        optimizers = [_built(chosen, [one], rate, weight_decay) for one in (whole, *parts)]
        for number in range(_STEPS):
            gradient = _gradient(whole, number)
            pieces = gradient.flatten().split(_CUT)
            for optimizer, own in zip(optimizers, (gradient, *pieces), strict=True):
                optimizer.param_groups[0]["params"][0].grad = own.clone()
                optimizer.step()
    moved = torch.cat([part.detach() for part in parts]).view(_SHAPE)
    return bool(torch.allclose(whole.detach(), moved, rtol=1e-6, atol=1e-9))


def shrinks_evenly(chosen: Chosen) -> bool:
    """Tell whether a first step with weight decay shrinks all numbers of a matrix by one factor, whatever the gradient.

    A matrix and its negative, of the same norms, get the same gradient; what is left of their difference is the decay.
    """
    with _quietly(), torch.random.fork_rng(devices=[]):
        ends = []
        for sign in (1, -1):
            matrix = torch.nn.Parameter(sign * _matrix(*_SHAPE).detach())
            torch.manual_seed(0)
            optimizer = _built(chosen, [matrix], 0.1, 0.5)
            _step(optimizer, 0)
            ends.append(matrix.detach())
    left = (ends[0] - ends[1]) / (2 * _matrix(*_SHAPE).detach())
    return bool(torch.allclose(left, left.mean(), rtol=1e-4, atol=0))


def _matrix(*shape: int) -> torch.nn.Parameter:
    place = torch.linspace(-1.0, 1.5, math.prod(shape), dtype=torch.float64)
    return torch.nn.Parameter(place.cos().view(shape).float())


def _gradient(parameter, number: int) -> torch.Tensor:
    """Return a gradient of numbers that all differ, another each step."""
    place = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
    return torch.sin(1.7 * place + 0.9 * number + 0.3).to(parameter.dtype)


def _built(chosen: Chosen, parameters: list, learning_rate: float, weight_decay: float):
    matrices, vectors = ([p for p in parameters if (p.dim() > 1) is first] for first in (True, False))
    # groups as a trainer makes them; a part of a matrix stays in the group that decays
    if not matrices:
        matrices, vectors = vectors, []
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return chosen.kind(groups, lr=learning_rate, **copy.deepcopy(chosen.settings))


def _step(optimizer, number: int) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = _gradient(parameter, number)
    optimizer.step()


@contextlib.contextmanager
def _quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
