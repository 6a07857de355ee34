"""Private training in turns: a client of a federated run is trained anew in each round, and all of it is spent."""

import contextlib
import contextvars
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from posttrain.errors import ConfigError
from posttrain.privacy.accounting import Steps, epsilon
from posttrain.privacy.ledger import Ledger, steps_of


class _Turns(NamedTuple):
    folder: Path
    most: int


_CURRENT: contextvars.ContextVar[_Turns | None] = contextvars.ContextVar("turns", default=None)


class SpentError(ConfigError):
    """A client's turn that would spend more than is left of its target_epsilon; no step of it was taken."""


@contextlib.contextmanager
def of_client(folder: str | Path, most: int = 1) -> Iterator[None]:
    """Have private trainers that are built and trained inside be turns of one client, whose steps add up.

    A noise that follows from target_epsilon is solved for `most` turns of as many steps. Whoever drew the clients of a
    round saw who trained, so that all turns count as if they were certain: drawing clients amplifies nothing.

    Args:
        folder: on the client's own disk, for its ledger, which no other client has. A step is written there before its
            noise is drawn, so that a turn whose answer is lost has spent.
        most: turns that the client may be asked for.
    """
    token = _CURRENT.set(_Turns(Path(folder), most))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def most() -> int:
    """Return how many turns the noise of a private trainer is to be solved for; 1 outside of `of_client`."""
    current = _CURRENT.get()
    return 1 if current is None else current.most


def ledger_of(kind: Steps, **given) -> Ledger:
    """Return the ledger of a trainer: its own, or that of the client whose turn it is; arguments of `Ledger`."""
    current = _CURRENT.get()
    return Ledger(kind, **given) if current is None else ClientLedger(kind, current.folder, **given)


class ClientLedger(Ledger):
    """Counts the steps of all turns of a client, on whatever rows: they are its own, and most of them the same.

    Arguments are those of `Ledger`, and `own_folder`, which the ledger is in wherever the run is.
    """

    _told_anew = slice(-1, None)

    def __init__(self, kind: Steps, own_folder: Path, **given) -> None:
        super().__init__(kind, **given)
        self._folder = own_folder

    # stands on Ledger.begin
    def begin(self, folder: Path | None, planned: int, checkpoint: Path | None = None, strict: bool = True) -> None:
        super().begin(self._folder, planned)

    def thrown_away(self) -> int:
        # what became of an answer is not known where it was given
        return 0

    def of_weights(self) -> float:
        return self.spent()

    def _history(self) -> list[Steps]:
        return [steps_of(session) for session in self._sessions.values()]

    def _check_planned(self, planned: int) -> None:
        if self.target_epsilon is None:
            return
        before = self._history()
        spends = epsilon([*before, self.kind._replace(steps=planned)], **self._promise)
        # as a solved noise is only told to so many digits
        if spends > self.target_epsilon * (1 + 1e-9):
            raise SpentError(
                f"its privacy is spent: {planned} steps more, after {sum(entry.steps for entry in before)}, would come "
                f"to epsilon {spends:.6g} at delta {self.delta:g}, and target_epsilon is {self.target_epsilon:g}"
            )
