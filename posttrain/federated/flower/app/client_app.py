"""The app of the nodes: each trains its turn of a round on its own rows."""

from posttrain.federated.flower import Node, client_app


def clients(node: Node):
    """Return what trains the client of a node."""
    from posttrain.federated.clients import TrainerClients
    from posttrain.federated.flower.settings import federated_config

    from . import task

    config = federated_config(node.settings)
    build = task.builder(node.settings)
    model, rows = task.adapted(node.settings), {node.client: task.rows(node)}
    # of a client that trains privately: a folder of the holder's, which must stay from round to round
    return TrainerClients(model, rows, build, config, ledgers=node.config.get("ledgers"))


app = client_app(clients)
