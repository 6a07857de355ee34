"""Figures that are computed in a thread before they are asked for, while steps run."""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Hashable

_live: weakref.WeakSet = weakref.WeakSet()


class Ahead:
    """Computes a figure in a thread, so that whoever asks for it later does not wait.

    Args:
        compute: gives the figure of a key, and remembers it; what it raises is raised when it is asked for.
    """

    def __init__(self, compute: Callable[[Hashable], float]) -> None:
        self._compute = compute
        self._key: Hashable = None
        self._thread: threading.Thread | None = None
        _live.add(self)

    def begin(self, key: Hashable) -> None:
        """Begin to compute the figure of a key, unless it is being computed. Another that is not done is waited for."""
        if self._key == key:
            return
        self.wait()
        self._key = key
        self._thread = threading.Thread(target=self._run, args=(key,), name="posttrain-ahead", daemon=True)
        self._thread.start()

    def _run(self, key: Hashable) -> None:
        # computed again where it is asked for, it raises there
        with contextlib.suppress(BaseException):
            self._compute(key)

    def get(self, key: Hashable) -> float:
        """Return the figure of a key: what the thread has found, or will have in a moment; else computed here."""
        if self._key == key:
            self.wait()
        return self._compute(key)

    def wait(self) -> None:
        """Return once no thread runs."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
            self._thread = self._key = None


def _wait_for_all() -> None:
    for one in list(_live):
        one.wait()


# a process that is forked while a thread computes would have locks that nobody opens
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_all)
