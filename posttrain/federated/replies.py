"""What a client sends back in a round, looked at before it is averaged: its tensors, their numbers, its rows."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.checks import is_beyond_floats, plain, shorten
from posttrain.errors import DataError
from posttrain.federated.aggregation import update_norm
from posttrain.federated.config import FederatedConfig
from posttrain.federated.methods import METHODS, Shared
from posttrain.log import get_logger
from posttrain.objectives.factors import DTYPES, is_finite
from posttrain.visible import one_line

# names of tensors that a message lists
_SHOWN = 3
# of a client's metrics, those that the report of a round has
_TOLD = ("loss", "epsilon", "delta")
# within which two epsilons are one
_SAME = 1e-9


@dataclass(frozen=True)
class Reply:
    """What a client sends back.

    Attributes:
        client: its own id. rows: that it trained on.
        B: by the path of the module. A: likewise, where the method has clients train it; else nothing.
        metrics: of its training, by name; `loss` is its mean, `epsilon` and `delta` what a private client has
            promised of all its turns.
        fault: why there is nothing to average, where it could not train.
    """

    client: str
    rows: int = 0
    B: Mapping[str, Tensor] = field(default_factory=dict)
    A: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    fault: str | None = None


@dataclass(frozen=True)
class Checked:
    """The replies of a round.

    Attributes:
        good: by client, in the order of their ids. faults: why each of the others is left out, likewise.
    """

    good: dict[str, Reply]
    faults: dict[str, str]


def check(
    replies: Iterable[Reply],
    asked: Iterable[str],
    sent: Shared,
    config: FederatedConfig,
    round: int,
    epsilons: Mapping[str, float] | None = None,
) -> Checked:
    """Tell good replies from bad ones, which are dropped with a warning or end the run, as `on_bad_reply` says.

    Args:
        replies: in any order. asked: the clients that were to train. sent: what they began with.
        epsilons: that private clients have told of before, by their ids; every later one is more.

    Raises:
        DataError: a bad reply under `on_bad_reply: abort`, or fewer good ones than `min_replies`.
    """
    asked, trains_a = set(asked), METHODS[config.method].trains_a
    good: dict[str, Reply] = {}
    faults: dict[str, str] = {}
    for reply in replies:
        shown = one_line(reply.client)[:200]
        if not isinstance(reply.client, str) or reply.client not in asked:
            faults[shown] = "it was not asked to train in this round"
        elif reply.client in good or reply.client in faults:
            # which of the two is the client's own is not known
            good.pop(reply.client, None)
            faults[reply.client] = "it answered more than once"
        elif told := fault(reply, sent, trains_a) or _forgotten(reply, (epsilons or {}).get(reply.client)):
            faults[reply.client] = told
        else:
            good[reply.client] = reply
    for client in asked - good.keys() - faults.keys():
        faults[client] = "it did not answer"
    good, faults = dict(sorted(good.items())), dict(sorted(faults.items()))
    for client, told in faults.items():
        if config.on_bad_reply == "abort":
            raise DataError(
                f"round {round}: the reply of client {client} cannot be averaged: {told}. With `on_bad_reply: drop` "
                "the run goes on without it."
            )
        get_logger().warning("round %d goes on without client %s: %s", round, client, told)
    if len(good) < config.min_replies:
        left = "; ".join(f"{client}: {told}" for client, told in list(faults.items())[:_SHOWN])
        raise DataError(
            f"round {round} has {len(good)} good replies of {len(asked)}, and min_replies is {config.min_replies}. "
            f"Left out were {left or 'none'}. The checkpoint of the round before is what the run can go on from."
        )
    return Checked(good, faults)


def fault(reply: Reply, sent: Shared, trains_a: bool) -> str | None:
    """Say why a reply cannot be averaged; None where it can."""
    if reply.fault is not None:
        return one_line(reply.fault)
    rows = plain(reply.rows)
    if isinstance(rows, bool) or not isinstance(rows, int) or not 1 <= rows < 1 << 53:
        return f"it says that it trained on {shorten(reply.rows)} rows, and that is no number of rows of 1 or more"
    for letter, tensors, wanted in (("B", reply.B, sent.B), ("A", reply.A, sent.A if trains_a else {})):
        if not isinstance(tensors, Mapping):
            return f"its {letter} is a {type(tensors).__name__}; it must be tensors by the path of their module"
        if told := _keys(letter, tensors, wanted) or _tensors(letter, tensors, wanted):
            return told
    if not isinstance(reply.metrics, Mapping):
        return f"its metrics are a {type(reply.metrics).__name__}; they must be numbers by name"
    for name in _TOLD:
        value = plain(reply.metrics.get(name))
        if value is not None and not _is_finite_number(value):
            return f"its {name} is {shorten(value)}, which is no finite number"
    epsilon = plain(reply.metrics.get("epsilon"))
    if epsilon is not None and epsilon < 0:
        return f"its epsilon is {epsilon:g}, which is below 0"
    return None


def _forgotten(reply: Reply, before: float | None) -> str | None:
    now = reply.metrics.get("epsilon")
    if before is None or (now is not None and now > before * (1 + _SAME)):
        return None
    said = "no epsilon" if now is None else f"epsilon {now:.6g}"
    return (
        f"it tells of {said}, and told of {before:.6g} in an earlier round: its ledger is not the one that it was. Put "
        "it back on the client's disk"
    )


def _is_finite_number(value) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or is_beyond_floats(value):
        return False
    return math.isfinite(value)


def norm_of(reply: Reply, sent: Shared) -> float:
    """Return the norm of a good reply's update, over all tensors that it has."""
    parts = [update_norm(part, start) for part, start in ((reply.B, sent.B), (reply.A, sent.A)) if part]
    return math.hypot(*parts)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that tensors take when they are sent."""
    return sum(value.numel() * value.element_size() for value in tensors)


def _keys(letter: str, tensors: Mapping, wanted: Mapping) -> str | None:
    missing, other = sorted(wanted.keys() - tensors.keys()), sorted(map(str, tensors.keys() - wanted.keys()))
    told = [f"{letter} is missing of {_some(missing)}"] * bool(missing)
    asked = f"{letter} of {_some(other)}, which it was not asked for"
    told += [f"it sent {asked}"] * bool(other)
    return " and ".join(told) or None


def _tensors(letter: str, tensors: Mapping, wanted: Mapping) -> str | None:
    for name in sorted(wanted):
        value, like = tensors[name], wanted[name]
        which = f"{letter} of {one_line(name)[:200]}"
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            return f"{which} is {type(value).__name__}; it must be a dense tensor with its numbers"
        if value.shape != like.shape:
            return f"{which} has the shape {list(value.shape)}; it must be {list(like.shape)}"
        # types that the run's own holds
        if value.dtype not in DTYPES or torch.promote_types(value.dtype, like.dtype) != like.dtype:
            return f"{which} is of {value.dtype}; it must be of {like.dtype}, or a floating type that it holds"
        if not is_finite(value):
            bad = int((~torch.isfinite(value)).sum())
            return f"{which} has {bad:,} of {value.numel():,} numbers that are not finite; its training diverged"
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(one_line(name)[:200] for name in names[:_SHOWN]) + more
