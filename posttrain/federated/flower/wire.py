"""What server and clients of a Flower run send each other, as plain values, without Flower's own classes.

A message down has B as its one ArrayRecord, an array a module, and one ConfigRecord with the round's order and A as
bytes: Flower's clipping mods ask for one record of each kind, and for the same arrays both ways. A reply has B and the
number of rows.
"""

import io
import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from posttrain.checks import shorten
from posttrain.errors import ConfigError, DataError
from posttrain.federated.methods import METHODS, Shared
from posttrain.visible import listed, one_line

FORMAT = 1
# names in a ConfigRecord, and of the record itself
ORDER, FACTORS, CONFIG = "posttrain-order", "posttrain-a", "config"
# names in a MetricRecord; the first is Flower's
ROWS, LOSS = "num-examples", "loss"
# of an array's header, beyond which it is no header of numpy's
_LONGEST_HEADER = 10_000
# names that a message lists
_SHOWN = 3


class Order(NamedTuple):
    """What a client is told of a round, beside the factors.

    Attributes:
        round: its number, from 1. seed: the run's `federated_seed`, of which each client draws its own.
        method: whose factors these are. tells_rows: whether the average weighs clients by rows, so that their number
            is asked for.
        base: digests of the model that the run began with, by name.
    """

    round: int
    seed: int
    method: str
    tells_rows: bool
    base: dict[str, str]


def entries(order: Order, A: Mapping[str, Tensor]) -> dict[str, str | bytes]:
    """Return what a ConfigRecord has of an order and of A."""
    from safetensors.torch import save

    held = {name: value.detach().contiguous() for name, value in A.items()}
    return {ORDER: json.dumps({"format": FORMAT, **order._asdict()}), FACTORS: save(held)}


def read(found: Mapping) -> tuple[Order, dict[str, Tensor]]:
    """Return the order and A that `entries` wrote.

    Raises:
        DataError: something else.
    """
    from safetensors.torch import load

    try:
        told = json.loads(found[ORDER])
        if told.pop("format") != FORMAT:
            raise ValueError("format")
        order = Order(**told)
        A = load(found[FACTORS])
    except Exception as error:
        raise DataError(
            f"the server's message is of another form than this version reads ({type(error).__name__}). Run the same "
            "version of posttrain on the server and on all nodes."
        ) from None
    for name, kind in (("round", int), ("seed", int), ("method", str), ("tells_rows", bool), ("base", dict)):
        if type(getattr(order, name)) is not kind:
            raise DataError(f"the server's message has {name} {shorten(getattr(order, name))}, which is none.")
    # in memory of torch's own, products have the bits that they have in one process
    return order, {name: value.clone() for name, value in A.items()}


def array_of(data: bytes) -> np.ndarray:
    """Return the array in the bytes of a .npy file, of which nothing is believed before it is looked at.

    Raises:
        ValueError: bytes that are no array of numbers, or whose header tells of more than they hold.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in header:
        raise ValueError(f"version {version}")
    shape, is_fortran, dtype = header[version](file, max_header_size=_LONGEST_HEADER)
    if dtype.hasobject or dtype.kind not in "fiu":
        raise ValueError(f"numbers of {dtype}")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if count < 0 or len(data) - file.tell() != count * dtype.itemsize:
        raise ValueError("another length than its header tells")
    values = np.frombuffer(data, dtype, count, file.tell())
    return values.reshape(shape[::-1]).T if is_fortran else values.reshape(shape)


def tensors_of(arrays: Iterable[tuple[str, bytes]]) -> dict[str, Tensor]:
    """Return the tensors in the bytes of .npy files, by their names. Raises ValueError as `array_of` does."""
    return {name: torch.from_numpy(np.array(array_of(data))) for name, data in arrays}


def check_fits(shared: Shared, start: Shared) -> None:
    """Raise ConfigError where the factors that a node is sent are not of the modules and shapes of its own model."""
    for letter, sent, own in (("A", shared.A, start.A), ("B", shared.B, start.B)):
        if other := sorted(sent.keys() ^ own.keys()):
            raise ConfigError(
                f"the server's adapter and this node's have {letter} of other modules: {listed(other[:_SHOWN])}. Give "
                "both the same model, rank and target_modules."
            )
        for name, value in sent.items():
            if value.shape != own[name].shape:
                raise ConfigError(
                    f"the server's {letter} of {one_line(name)} has the shape {list(value.shape)}, and this node's "
                    f"{list(own[name].shape)}. Give both the same model, rank and target_modules."
                )


def check_base(told: Mapping[str, str], own: Mapping[str, str], is_quantised: bool) -> None:
    """Raise ConfigError where a node's base model is another one than the run began with.

    Args:
        told, own: digests by name, as `TrainerClients.identity` has them. is_quantised: whether the node's weights
            are, which have other digests.
    """
    compared = {"base"} if is_quantised else {"base", "base_weights"}
    other = sorted(name for name in compared & told.keys() & own.keys() if told[name] != own[name])
    if other:
        what = "shape" if "base" in other else "weights"
        raise ConfigError(
            f"this node's base model is another one than the run began with: its {what} differ. What clients learn is "
            "averaged, and has a meaning on one base alone. Load the same model and revision."
        )


def check_method(method: str, trains_a: bool) -> None:
    """Raise ConfigError where a node's settings have clients train other factors than the server's method."""
    if method not in METHODS or METHODS[method].trains_a != trains_a:
        raise ConfigError(
            f"the server's method is {shorten(method)}, and this node's "
            f"{'trains A as well' if trains_a else 'leaves A alone'}. Give both the same settings."
        )
