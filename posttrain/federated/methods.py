"""The federated methods and rules of averaging by name, what each needs of the clients, and the step of a round."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.federated import aggregation
from posttrain.federated.seeds import generator

# what the server has to see of the clients
SUM_OF_B, SUM_OF_BOTH, EVERY_REPLY = "the sum of B", "the sums of A and B", "every reply"


class Method(NamedTuple):
    """A federated method.

    Attributes:
        needs: what the server has to see: SUM_OF_B, SUM_OF_BOTH or EVERY_REPLY.
        trains_a: whether clients train A beside B. refactors: whether the server makes A orthonormal, and when:
            never, every (so many rounds) or once (after so many).
        moves_base: whether the server also changes the base weights that clients go on with.
    """

    needs: str
    trains_a: bool = False
    refactors: str = "never"
    moves_base: bool = False


class Rule(NamedTuple):
    """A rule by which replies become one.

    Attributes:
        needs: what the server has to see: SUM_OF_B for a sum of any kind, or EVERY_REPLY.
        weighs: whether clients have weights; without, each counts once.
        least: the fewest replies that it has a meaning for.
    """

    needs: str
    weighs: bool
    least: int = 1


METHODS: Mapping[str, Method] = {
    "fedsvd": Method(SUM_OF_B, refactors="every"),
    "ffa_lora": Method(SUM_OF_B),
    "ffa_refactored_once": Method(SUM_OF_B, refactors="once"),
    "fedavg_lora": Method(SUM_OF_BOTH, trains_a=True),
    "flora": Method(EVERY_REPLY, trains_a=True, moves_base=True),
    "fedex_lora": Method(EVERY_REPLY, trains_a=True, moves_base=True),
}
RULES: Mapping[str, Rule] = {
    "mean": Rule(SUM_OF_B, weighs=True),
    "norm_bound": Rule(EVERY_REPLY, weighs=True),
    "median": Rule(EVERY_REPLY, weighs=False, least=3),
    "trimmed_mean": Rule(EVERY_REPLY, weighs=False, least=3),
}


def needed(method: str, rule: str = "mean") -> str:
    """Return what the server has to see of the clients under a method with a rule: a sum alone, or every reply."""
    return EVERY_REPLY if RULES[rule].needs == EVERY_REPLY else METHODS[method].needs


class Shared(NamedTuple):
    """What all clients of a run begin a round with, by the path of each module: W + scale (B A + base).

    Attributes:
        A: (r, d_in). B: (d_out, r).
        base: factors (A, B) of the change of the base weights, of methods that move them; else nothing.
    """

    A: dict[str, Tensor]
    B: dict[str, Tensor]
    base: dict[str, tuple[Tensor, Tensor]]

    def product(self, name: str) -> Tensor:
        """Return the whole change of a module's weight over its scale, (d_out, d_in), in fp64."""
        made = self.B[name].double() @ self.A[name].double()
        if name in self.base:
            a, b = self.base[name]
            made += b.double() @ a.double()
        return made


def step(
    shared: Shared, A: Mapping[str, Mapping], B: Mapping[str, Mapping], rows: Mapping[str, int], config, round: int
) -> Shared:
    """Return what clients begin the next round with.

    Args:
        shared: what they began this round with.
        A, B: factors by module, by client; A is empty where the method does not train it.
        rows: that each client trained on. config: a `FederatedConfig`. round: its number, from 1.

    Raises:
        DataError: numbers that are beyond their type.
    """
    method = METHODS[config.method]
    if method.moves_base:
        return _moved(shared, A, B, aggregation.shares(rows, config.weights), config, round)
    if config.aggregation == "norm_bound":
        A, B = _bounded(shared, A, B, config.update_norm_bound)
    mean_b = _averaged(B, rows, config)
    mean_a = _averaged(A, rows, config) if method.trains_a else shared.A
    return made_of(shared, mean_a, mean_b, config, round)


def made_of(shared: Shared, A: Mapping[str, Tensor], B: Mapping[str, Tensor], config, round: int) -> Shared:
    """Return what clients begin the next round with, of averages in fp64: refactored where the round asks for it.

    Args:
        shared: what clients began this round with, whose types the factors keep. A, B: by module.

    Raises:
        DataError: numbers that are beyond their type.
    """
    dtypes = {name: value.dtype for name, value in shared.B.items()}
    if refactors_after(config, round):
        return Shared(*aggregation.refactored(A, B, dtypes), shared.base)
    return Shared(_stored(A, dtypes), _stored(B, dtypes), shared.base)


def refactors_after(config, round: int) -> bool:
    """Tell whether A is made orthonormal after a round."""
    kind, every = METHODS[config.method].refactors, config.refactor_every_rounds
    if kind == "never" or not every:
        return False
    return round == every if kind == "once" else round % every == 0


def drawn_a(shapes: Mapping[str, torch.Size], dtypes: Mapping[str, torch.dtype], seed: int, round: int) -> dict:
    """Draw an A for each module as PEFT does by default, uniform in +-1 / sqrt(d_in), by seed and round alone."""
    made = {}
    for name in sorted(shapes):
        bound = 1 / math.sqrt(shapes[name][1])
        values = torch.rand(shapes[name], generator=generator(seed, "a", round, name), dtype=torch.float64)
        made[name] = ((2 * values - 1) * bound).to(dtypes[name])
    return made


def _averaged(tensors, rows, config) -> dict[str, Tensor]:
    if config.aggregation == "median":
        return aggregation.median(tensors)
    if config.aggregation == "trimmed_mean":
        return aggregation.trimmed_mean(tensors, config.trim_fraction)
    return aggregation.average(tensors, aggregation.shares(rows, config.weights))


def _bounded(shared: Shared, A, B, bound: float) -> tuple[dict, dict]:
    """Bound each client's update by its norm over A and B together."""
    start = _joined(shared.A, shared.B)
    made = aggregation.bounded({client: _joined(A.get(client, {}), B[client]) for client in B}, start, bound)
    parts = [
        {client: {name: value for (side, name), value in made[client].items() if side == part} for client in made}
        for part in ("A", "B")
    ]
    return parts[0], parts[1]


def _joined(A, B) -> dict:
    return {("A", name): value for name, value in A.items()} | {("B", name): value for name, value in B.items()}


def _moved(shared: Shared, A, B, shares, config, round: int) -> Shared:
    """Return the next round's factors where what no average of A and B holds goes into the base."""
    dtypes = {name: value.dtype for name, value in shared.B.items()}
    if config.method == "flora":
        moved = aggregation.stack(A, B, shares)
        shapes = {name: value.shape for name, value in shared.A.items()}
        new_a = drawn_a(shapes, dtypes, config.federated_seed, round)
        new_b = {name: torch.zeros_like(value) for name, value in shared.B.items()}
    else:
        moved = aggregation.residual(A, B, shares)
        new_a, new_b = (_stored(aggregation.average(part, shares), dtypes) for part in (A, B))
    base = {name: aggregation.added(shared.base.get(name), moved[name], dtypes[name]) for name in shared.B}
    return Shared(new_a, new_b, base)


def _stored(tensors, dtypes) -> dict[str, Tensor]:
    return {name: value.to(dtypes[name]).contiguous() for name, value in tensors.items()}
