"""The client app of a Flower run: a node trains its turn of a round with a trainer of ours, or TRL's."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from posttrain.errors import ConfigError, DataError
from posttrain.federated.flower.nodes import CLIENT, client_of
from posttrain.log import get_logger

# a client's own number, beside those of Flower's errors
_FAILED = 1000


class NothingToSend(DataError):
    """A turn that has nothing to average: its training diverged, or its ledger is spent."""


class Node(NamedTuple):
    """The node that a client app runs on.

    Attributes:
        client: the name of the client whose rows it has, by `client` of its config.
        config: of the node, which its holder gives to the SuperNode: where the rows are.
        settings: of the run, as the app's pyproject.toml and `flwr run` give them.
    """

    client: str
    config: Mapping
    settings: Mapping


def client_app(clients: Callable[[Node], object], mods: Sequence[Callable] = ()) -> ClientApp:
    """Make the client app of a run that `FedSVD` leads.

    Heavy libraries are imported where a turn begins: a node that is only asked whose rows it has answers at once.

    Args:
        clients: `clients(node)` returns a `TrainerClients` whose rows are those of `node.client`. It is called once a
            client in a process; under SuperNodes a process lives for one message.
        mods: Flower's, such as fixedclipping_mod, around training alone.
    """
    app, held = ClientApp(), {}

    @app.query()
    def roll(message: Message, context: Context) -> Message:
        return Message(RecordDict({"config": ConfigRecord({CLIENT: client_of(context.node_config)})}), reply_to=message)

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        return guarded(message, lambda: _turn(message, context, clients, held))

    return app


def guarded(message: Message, turn: Callable[[], Message]) -> Message:
    """Return what a turn returns, or an error that tells the server no more than the kind of what went wrong.

    Texts of errors quote rows, settings and paths, which do not leave the node; its own log has them.
    """
    try:
        return turn()
    except Exception as error:
        get_logger().exception("this node could not train")
        told = type(error).__name__
        return Message(Error(_FAILED, f"{told}; the node's own log says more"), reply_to=message)


def turns_of(context: Context, clients: Callable[[Node], object], held: dict) -> tuple[str, object]:
    """Return the client's name and its `TrainerClients`, which a process makes once."""
    from posttrain.federated.clients import TrainerClients

    client = client_of(context.node_config)
    if client not in held:
        made = clients(Node(client, dict(context.node_config), dict(context.run_config)))
        if not isinstance(made, TrainerClients) or set(made.rows) != {client}:
            raise ConfigError(
                f"clients(node) returned {type(made).__name__} for client {client}; it must be a TrainerClients with "
                "the rows of this client alone: TrainerClients(model, {node.client: rows}, build, config)."
            )
        # a process may live for one message
        made.needs_ledgers = True
        held[client] = made
    return client, held[client]


def _turn(message: Message, context: Context, clients: Callable[[Node], object], held: dict) -> Message:
    from posttrain.federated.flower import records, wire

    found = records.only(message.content.config_records, "config")
    B = records.tensors(records.only(message.content.array_records, "arrays"))
    order, A = wire.read(found)
    client, turns = turns_of(context, clients, held)
    reply = train_turn(client, turns, order, A, B)
    if reply.fault is not None:
        raise NothingToSend(reply.fault)
    return records.answer(message, reply, list(B), order.tells_rows)


def train_turn(client: str, turns, order, A: Mapping, B: Mapping):
    """Train a client's turn on factors that a server sent, and return its reply."""
    from posttrain.federated.clients import Task
    from posttrain.federated.flower import wire
    from posttrain.federated.methods import Shared
    from posttrain.federated.seeds import seed_of
    from posttrain.mechanisms.base_digests import quantisation

    shared = Shared(dict(A), dict(B), {})
    wire.check_method(order.method, turns.adapter.trains_a)
    wire.check_fits(shared, turns.start)
    wire.check_base(order.base, turns.identity(), quantisation(turns.adapter.model)["quantisation"] is not None)
    seed = seed_of(order.seed, "turn", client, order.round)
    return turns(Task(client, order.round, seed, shared))
