"""Which node of a Flower run has the rows of which client: what nodes say, and what of it is believed."""

from collections.abc import Iterable, Mapping

from posttrain.checks import plain, shorten
from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.visible import listed, one_line

# in the answer to a roll call
CLIENT = "posttrain-client"


def client_of(node_config: Mapping) -> str:
    """Return the client's name that a node's settings give: `client`, or Flower's `partition-id` of `num-partitions`.

    Raises:
        ConfigError: neither, or no name of one visible line.
    """
    name, place, count = (plain(node_config.get(key)) for key in ("client", "partition-id", "num-partitions"))
    if name is None and type(place) is int and type(count) is int and 0 <= place < count <= 10**6:
        from posttrain.federated.partitions import names

        return names(count)[place]
    if not _is_name(name):
        raise ConfigError(
            f"the node's config has client {shorten(name)}; it must be the name of the client whose rows it has. Start "
            """its SuperNode with --node-config 'client="NAME"'."""
        )
    return name


class Roster:
    """The clients of a run, and the nodes that speak for them.

    A node speaks for a client from the first time that it says so, for as long as it is connected: another one that
    says the same is not asked to train. Who may connect at all is Flower's to check (the SuperNodes' keys).

    Args:
        clients: the names of all that take part.

    Raises:
        ConfigError: no names, or a name twice.
    """

    def __init__(self, clients: Iterable[str]) -> None:
        found = [clients] if isinstance(clients, str) else list(clients)
        if not found or not all(map(_is_name, found)) or len(set(found)) < len(found):
            raise ConfigError(
                f"clients is {shorten(clients)}; it must be the names of all clients that take part, each once: "
                "texts of one visible line."
            )
        self.clients = tuple(sorted(found))
        # by node; None of one that is not asked
        self._said: dict[int, str | None] = {}

    def unknown(self, connected: Iterable[int]) -> list[int]:
        """Forget nodes that have gone, and return those that have not said yet whose rows they have."""
        there = set(connected)
        self._said = {node: name for node, name in self._said.items() if node in there}
        return sorted(there - self._said.keys())

    def hear(self, node: int, name) -> None:
        """Take down whose rows a node says that it has."""
        told = None
        if not isinstance(name, str) or name not in self.clients:
            told = f"it says that it is {one_line(shorten(name))}, which is none of {listed(self.clients)}"
        elif name in self.nodes():
            told = f"it says that it is {one_line(name)}, for which another node speaks that is connected"
        if told:
            get_logger().warning("node %d is not asked to train: %s", node, told)
        self._said[node] = None if told else name

    def nodes(self) -> dict[str, int]:
        """Return the connected nodes by their client."""
        return {name: node for node, name in self._said.items() if name is not None}

    def client(self, node: int) -> str | None:
        """Return the client that a node speaks for."""
        return self._said.get(node)


def _is_name(name) -> bool:
    return isinstance(name, str) and bool(name.strip()) and one_line(name) == name and len(name) <= 200
