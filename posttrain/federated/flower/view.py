"""A grid of which a strategy sees some nodes alone."""

from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid


class NodesOf(Grid):
    """Gives on what it is asked to another grid, and names some of its nodes alone.

    Args:
        grid: the whole one. nodes: that are seen.
    """

    def __init__(self, grid: Grid, nodes: list[int]) -> None:
        self._grid, self._nodes = grid, nodes

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are seen."""
        return list(self._nodes)

    def set_run(self, run) -> None:
        """Give on."""
        self._grid.set_run(run)

    @property
    def run(self):
        """The run of the whole grid."""
        return self._grid.run

    def create_message(self, *args, **kwargs) -> Message:
        """Give on."""
        return self._grid.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Give on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Give on."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Give on."""
        return self._grid.send_and_receive(messages, timeout=timeout)
