"""Flower's records and messages made of what `wire` has, and replies read from them."""

from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from posttrain.federated.flower import wire
from posttrain.federated.replies import Reply
from posttrain.visible import one_line


def arrays(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> ArrayRecord:
    """Return tensors as a record, in their order; as another type where one is given."""
    return ArrayRecord({name: Array(value.detach().to("cpu", dtype).numpy()) for name, value in tensors.items()})


def tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of a record. Raises ValueError for what is no array of numbers."""
    if not all(array.stype == "numpy.ndarray" for array in record.values()):
        raise ValueError("arrays of another library")
    return wire.tensors_of((name, array.data) for name, array in record.items())


def only(records: Mapping, kind: str):
    """Return the one record of a kind. Raises ValueError where there is another number of them."""
    if len(records) != 1:
        raise ValueError(f"{len(records)} records of {kind}")
    return next(iter(records.values()))


def reply_of(message: Message, client: str) -> Reply:
    """Read what a client sent back; what cannot be read is a reply with a fault."""
    if message.has_error():
        return Reply(client, fault=f"its node could not train: {one_line(message.error.reason)[:500]}")
    try:
        found = only(message.content.metric_records, "metrics")
        B = tensors(only(message.content.array_records, "arrays"))
        metrics = {name: value for name, value in found.items() if name != wire.ROWS}
        return Reply(client, found.get(wire.ROWS, 0), B, {}, metrics)
    except Exception as error:
        # bytes of others: whatever they are made to raise
        return Reply(client, fault=f"its reply cannot be read ({type(error).__name__}: {one_line(error)[:200]})")


def answer(message: Message, reply: Reply, order: list[str], tells_rows: bool) -> Message:
    """Return a client's reply as Flower sends it.

    Args:
        order: names of the arrays as they came. tells_rows: whether the number of rows goes with it, or 1.
    """
    metrics = {name: float(value) for name, value in reply.metrics.items()}
    metrics[wire.ROWS] = reply.rows if tells_rows else 1
    content = {"arrays": arrays({name: reply.B[name] for name in order}), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


def give_on(message: Message, reply: Reply, names: list[str], rows: int, metrics: set[str]) -> Message:
    """Have a checked reply's message hold what a strategy averages: B in fp64, in one order, and the same metrics.

    Args:
        names: of the arrays, in the order that all have. rows: the weight. metrics: names that all clients tell.
    """
    told = only(message.content.metric_records, "metrics")
    kept = {name: told[name] for name in told if name in metrics and name != wire.ROWS}
    held = {name: reply.B[name] for name in names}
    record = MetricRecord({**kept, wire.ROWS: rows})
    message.content = RecordDict({"arrays": arrays(held, torch.float64), "metrics": record})
    return message


def config(values: Mapping) -> ConfigRecord:
    """Return values by name as the one ConfigRecord of a message."""
    return ConfigRecord(dict(values))
