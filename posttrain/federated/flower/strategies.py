"""The strategies of Flower that FedSVD can be put around, told by the names of their classes before a round begins."""

from typing import NamedTuple

from posttrain.errors import ConfigError
from posttrain.federated.config import FederatedConfig
from posttrain.federated.flower.wire import ROWS
from posttrain.federated.methods import METHODS

# their state is in the coordinates of B, which a refactorisation turns
_STATEFUL = ("FedOpt", "FedAvgM", "FedMom")
_TREES = ("FedXgbBagging", "FedXgbCyclic")
_PRIVATE = "DifferentialPrivacy"
# what the mod for adaptive clipping tells: whether it clipped
_NORM_BIT = "norm_bit"


class Found(NamedTuple):
    """What a strategy was found to be.

    Attributes:
        names: of the classes, the outer one first. is_private: whether it adds noise for the privacy of clients.
        clips_on_server: whether it divides by the norm of each client's update.
        reads: names of the metrics that it takes from each reply.
        trusts: the wrapper that has clients clip their updates to its `clipping_norm`, where one does.
    """

    names: list[str]
    is_private: bool
    clips_on_server: bool
    reads: frozenset[str]
    trusts: object | None


def check(strategy, config: FederatedConfig, drawn: int) -> Found:
    """Look at a strategy that is to average B.

    Args:
        drawn: how many clients train in a round.

    Raises:
        ConfigError: one that FedSVD cannot be put around under these settings, with the reason.
    """
    chain = _chain(strategy)
    for one in chain:
        if "Strategy" not in _flower_names(one):
            raise ConfigError(
                f"strategy is {type(one).__name__} of {type(one).__module__}; it must be a strategy of "
                "flwr.serverapp.strategy, such as FedAvg()."
            )
        if any(cls.__module__.startswith("posttrain.federated.flower") for cls in type(one).__mro__):
            raise ConfigError(
                "FedSVD is inside FedSVD, so that B would be refactored twice a round. Give the inner one's strategy."
            )
    _check_method(config)
    for one in chain:
        _check_kind(type(one).__name__, _flower_names(one), config)
    private = [one for one in chain if any(name.startswith(_PRIVATE) for name in _flower_names(one))]
    for one in private:
        _check_private(type(one).__name__, one, chain[-1], config, drawn)
    _check_sampling(type(chain[-1]).__name__, chain[-1], drawn)
    clips = any("ServerSide" in name for one in private for name in _flower_names(one))
    reads = {one.train_loss_key for one in chain if hasattr(one, "train_loss_key")}
    trusts = next((one for one in private if any("ClientSide" in name for name in _flower_names(one))), None)
    if trusts is not None and any("ClientSideAdaptive" in name for name in _flower_names(trusts)):
        reads.add(_NORM_BIT)
    return Found([type(one).__name__ for one in chain], bool(private), clips, frozenset(reads), trusts)


def _check_method(config: FederatedConfig) -> None:
    method = METHODS[config.method]
    if method.trains_a:
        raise ConfigError(
            f"method is {config.method}, whose clients send A as well; FedSVD sends A as it is and averages B. Use "
            "fedsvd, ffa_lora or ffa_refactored_once, or `FederatedLoop`, which has all methods."
        )
    if config.aggregation != "mean":
        raise ConfigError(
            f"aggregation is {config.aggregation!r}, and on Flower the strategy makes one of the replies. Leave it "
            "out, and give FedSVD another strategy, such as FedMedian() or FedTrimmedAvg()."
        )


def _check_kind(called: str, names: set[str], config: FederatedConfig) -> None:
    if names & set(_TREES):
        raise ConfigError(f"strategy is {called}, which grows trees; give one that averages arrays, such as FedAvg().")
    if "FedProx" in names:
        raise ConfigError(
            "strategy is FedProx, whose clients add a proximal term to their loss; trainers here have none, so that "
            "the setting would do nothing. Use FedAvg()."
        )
    refactors = METHODS[config.method].refactors != "never" and config.refactor_every_rounds
    if names & set(_STATEFUL) and refactors:
        raise ConfigError(
            f"strategy is {called}, which keeps moments of B from round to round, and method {config.method} turns "
            "the coordinates of B after a round: the moments would be of another basis. Use FedAvg(), or "
            "`method: ffa_lora`, which never turns them."
        )


def _check_private(called: str, strategy, inside, config: FederatedConfig, drawn: int) -> None:
    if _flower_names(inside) != {"Strategy", "FedAvg"}:
        raise ConfigError(
            f"strategy is {called} around {type(inside).__name__}, and its noise is for a mean, in which a client has "
            "no more than its share: in what another rule makes, one client may count for more. Use FedAvg() inside."
        )
    if config.weights != "uniform":
        raise ConfigError(
            f"weights is {config.weights!r} and strategy is {called}, whose noise is for an average in which each "
            "client counts once: a client with many rows would have a larger share than it is protected for. Set "
            "`weights: uniform`."
        )
    sampled = getattr(strategy, "num_sampled_clients", drawn)
    if sampled != drawn:
        raise ConfigError(
            f"num_sampled_clients of {called} is {sampled}, and {drawn} clients train in a round; the noise is divided "
            f"by it. Give {drawn}."
        )


def _check_sampling(called: str, strategy, drawn: int) -> None:
    fraction = getattr(strategy, "fraction_train", 1.0)
    if fraction != 1.0:
        raise ConfigError(
            f"fraction_train of {called} is {fraction!r}; which clients train is drawn by clients_per_round and "
            "federated_seed, so that a run that goes on draws the same. Leave it out."
        )
    for name in ("min_train_nodes", "min_available_nodes"):
        least = getattr(strategy, name, 0)
        if least > drawn:
            raise ConfigError(
                f"{name} of {called} is {least}, and {drawn} clients train in a round: Flower would wait without end. "
                f"Give {drawn} or fewer; min_replies says how many replies a round needs."
            )
    if (key := getattr(strategy, "weighted_by_key", ROWS)) != ROWS:
        raise ConfigError(f"weighted_by_key of {called} is {key!r}; clients tell their rows as {ROWS}. Leave it out.")


def _chain(strategy) -> list:
    found = [strategy]
    while hasattr(found[-1], "strategy"):
        found.append(found[-1].strategy)
    return found


def _flower_names(strategy) -> set[str]:
    """Return the names of Flower's own classes that a strategy is of."""
    return {cls.__name__ for cls in type(strategy).__mro__ if cls.__module__.startswith("flwr.serverapp.")}
