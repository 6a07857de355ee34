"""Averages of what clients send back, and the factors that federated methods make of them: tensors in, tensors out.

All is computed in fp64 and in the order of the clients' own ids, so that the order in which replies arrive changes no
bit. Tensors are named by the path of their module: A (r, d_in), B (d_out, r).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from posttrain.adapters.low_rank import refactor
from posttrain.errors import ConfigError, DataError
from posttrain.objectives import low_rank
from posttrain.objectives.factors import stored

Named = Mapping[str, Tensor]
# of a share of the clients, what rounding may have added to it
_ROUNDING = 1e-9


def shares(rows: Mapping[str, int], weights: str = "rows") -> dict[str, float]:
    """Return the share of each client in an average, by its id; they add up to 1.

    Args:
        rows: n_k, the rows that each client trained on. weights: rows, n_k / sum n; or uniform, 1 / K.
    """
    if not rows:
        raise DataError("there is no client to average.")
    counted = {client: rows[client] if weights == "rows" else 1 for client in sorted(rows)}
    total = sum(counted.values())
    return {client: count / total for client, count in counted.items()}


def average(tensors: Mapping[str, Named], shares: Mapping[str, float]) -> dict[str, Tensor]:
    """Return sum_k w_k X_k of each named tensor in fp64, added up in the order of the clients' ids.

    Args:
        tensors: X_k by name, by client. shares: w_k by client.

    Source: arXiv 1602.05629 (FedAvg), of the clients' tensors.
    """
    added: dict[str, Tensor] = {}
    for client in _ordered(tensors):
        for name, value in tensors[client].items():
            part = value.detach().double() * shares[client]
            added[name] = part if name not in added else added[name].add_(part)
    return added


def median(tensors: Mapping[str, Named]) -> dict[str, Tensor]:
    """Return the median of each entry over the clients, in fp64; of an even number the mean of the middle two.

    Source: arXiv 1803.01498, definition 1.
    """

    def middle(values: Tensor) -> Tensor:
        count = len(values)
        return (values[(count - 1) // 2] + values[count // 2]) / 2

    return _of_sorted(tensors, middle)


def trimmed_mean(tensors: Mapping[str, Named], fraction: float) -> dict[str, Tensor]:
    """Return the mean of each entry without its largest and its smallest values, in fp64.

    Args:
        fraction: in (0, 0.5), the share of the clients that is left out at each end. The number is rounded up, so that
            there is somebody left out whatever the number of replies, but leaves one or two in the middle.

    Source: arXiv 1803.01498, definition 2.
    """
    cut = trimmed(len(tensors), fraction)
    return _of_sorted(tensors, lambda values: values[cut : len(values) - cut].mean(dim=0))


def trimmed(clients: int, fraction: float) -> int:
    """Return how many clients a trimmed mean leaves out at each end."""
    return min(math.ceil(clients * fraction - _ROUNDING), (clients - 1) // 2)


def bounded(tensors: Mapping[str, Named], start: Named, bound: float) -> dict[str, dict[str, Tensor]]:
    """Shorten each client's update X_k - X to a norm over all its tensors, and return X plus it, in fp64.

    An update within the bound is left as it is, to the bit.

    Args:
        start: X by name, what the clients began with. bound: of the Frobenius norm, above 0.
    """
    made = {}
    for client in _ordered(tensors):
        length = update_norm(tensors[client], start)
        if length <= bound:
            made[client] = {name: value.detach().double() for name, value in tensors[client].items()}
            continue
        factor = bound / length
        made[client] = {
            name: start[name].double() + factor * (value.detach().double() - start[name].double())
            for name, value in tensors[client].items()
        }
    return made


def update_norm(tensors: Named, start: Named) -> float:
    """Return ||X_k - X|| over all named tensors of a client, in the Frobenius norm and in fp64."""
    gaps = [torch.linalg.norm(value.detach().double() - start[name].double()) for name, value in tensors.items()]
    return torch.linalg.norm(torch.stack(gaps)).item()


def refactored(A: Named, B: Named, dtypes: Mapping[str, torch.dtype]) -> tuple[dict, dict]:
    """Write each product B A with an orthonormal A (FedSVD), computed in fp64; the products stay what they are.

    Args:
        dtypes: that both results of a module are stored in.

    Raises:
        ConfigError: a module with fewer inputs than its rank, which is named.
        DataError: numbers that are not finite, likewise.

    Source: arXiv 2505.12805, algorithm 1.
    """
    made_a, made_b = {}, {}
    for name in A:
        try:
            a, b = refactor(A[name].double(), B[name].double())
            made_a[name], made_b[name] = stored(a, dtypes[name]), stored(b, dtypes[name])
        except (ConfigError, DataError) as error:
            raise type(error)(f"{name}: {error}") from None
    return made_a, made_b


def stack(A: Mapping[str, Named], B: Mapping[str, Named], shares: Mapping[str, float]) -> dict[str, tuple]:
    """Return factors of sum_k w_k B_k A_k of each module, exactly (FLoRA): (K r, d_in) and (d_out, K r), in fp64.

    A is [A_1; ...; A_K] and B is [w_1 B_1, ..., w_K B_K], in the order of the clients' ids.

    Args:
        A, B: the factors by module, by client. shares: w_k by client.

    Source: arXiv 2409.05976.
    """
    clients = _ordered(A)
    return {
        name: (
            torch.cat([A[client][name].detach().double() for client in clients]),
            torch.cat([B[client][name].detach().double() * shares[client] for client in clients], dim=1),
        )
        for name in A[clients[0]]
    }


def residual(A: Mapping[str, Named], B: Mapping[str, Named], shares: Mapping[str, float]) -> dict[str, tuple]:
    """Return factors of sum_k w_k B_k A_k - B A of each module, B and A being the averages (FedEx-LoRA), in fp64.

    Arguments are those of `stack`; the factors have the rank (K + 1) r.

    Source: arXiv 2410.09432.
    """
    mean_a, mean_b = average(A, shares), average(B, shares)
    return {
        name: (torch.cat([a, mean_a[name]]), torch.cat([b, -mean_b[name]], dim=1))
        for name, (a, b) in stack(A, B, shares).items()
    }


def added(first: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple:
    """Add two changes of a weight, each as factors (A, B), and return the sum in factors of its own rank."""
    parts = [(a, b, 1.0) for a, b in (first, other)] if first is not None else [(*other, 1.0)]
    made = low_rank.merge(parts, dtype=dtype)
    return made.A, made.B


def _of_sorted(tensors: Mapping[str, Named], reduce) -> dict[str, Tensor]:
    """Reduce the sorted values (K, ...) of each entry."""
    clients = _ordered(tensors)
    return {
        name: reduce(torch.stack([tensors[client][name].detach().double() for client in clients]).sort(dim=0).values)
        for name in tensors[clients[0]]
    }


def _ordered(tensors: Mapping[str, Named]) -> list[str]:
    if not tensors:
        raise DataError("there is no client to average.")
    return sorted(tensors)
