"""A grid in one process: server and client apps of Flower as they are deployed, without SuperLink and SuperNodes."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from posttrain.errors import ConfigError
from posttrain.log import get_logger

# of Flower's messages, which ask for numbers of a run, a task and a node
_RUN = 1
# Flower's own for a client app that raised
_RAISED = 2


class InProcessGrid(Grid):
    """Has a client app answer messages one after the other, each node with a state of its own.

    Messages are copied on their way, as they are where they are sent: apps and mods change those that they are given.

    Args:
        app: of the clients.
        nodes: the config of each, as `--node-config` gives it. The number of a node is its place, from 1.
        settings: of the run.
    """

    def __init__(self, app: ClientApp, nodes: Sequence[Mapping], settings: Mapping | None = None) -> None:
        if not nodes:
            raise ConfigError("nodes is empty; give the config of each node, such as {'client': 'client-0'}.")
        self._app = app
        self._contexts = {
            number: _context(number, config, settings or {}) for number, config in enumerate(nodes, start=1)
        }
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = _RUN, 1, 0
        # numbers of nodes that are not connected any more
        self.gone: list[int] = []

    def set_run(self, run) -> None:
        """Nothing: there is one run."""

    @property
    def run(self):
        """The one run."""
        return SimpleNamespace(run_id=_RUN)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message, as Flower's own grids make it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the numbers of the nodes that are there."""
        return [number for number in self._contexts if number not in self.gone]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refuse: what is sent here is answered at once."""
        raise NotImplementedError("messages are answered at once here; use send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refuse: what is sent here is answered at once."""
        raise NotImplementedError("messages are answered at once here; use send_and_receive")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the answers of the nodes that are there; an app that raises is an error, as it is on a node."""
        return [self._answer(message) for message in messages if message.metadata.dst_node_id not in self.gone]

    def _answer(self, message: Message) -> Message:
        sent = copy.deepcopy(message)
        try:
            return copy.deepcopy(self._app(sent, self._contexts[sent.metadata.dst_node_id]))
        except Exception as error:
            get_logger().exception("the client app of node %d raised", sent.metadata.dst_node_id)
            return Message(Error(_RAISED, f"{type(error).__name__}"), reply_to=sent)


def run_in_process(server: ServerApp, client: ClientApp, nodes: Sequence[Mapping], settings: Mapping) -> InProcessGrid:
    """Run a server app with client apps in this process, and return the grid.

    Args:
        nodes: the config of each node. settings: of the run, as the app's pyproject.toml has them.
    """
    grid = InProcessGrid(client, nodes, settings)
    server(grid, _context(0, {}, settings))
    return grid


def _context(node: int, config: Mapping, settings: Mapping) -> Context:
    return Context(run_id=_RUN, node_id=node, node_config=dict(config), state=RecordDict(), run_config=dict(settings))
