"""What a process does when it is told to end: an exception that runs every `finally`, and children that end with it."""

import contextlib
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
# a launcher that gets the same signal passes it on at once, or dies of it, which is no second request
_SAME_REQUEST = 1.0


class Terminated(SystemExit):
    """The process was sent a signal that ends it; the exit code is 128 and its number, as a shell has it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return f"ended by {signal.Signals(self.number).name}"


def ending() -> tuple[int, ...]:
    """Return the numbers of the signals that ask a process to end, beside Ctrl-C; those that the system has."""
    return tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


def raise_terminated(number: int, frame=None) -> None:
    """Handle a signal: raise `Terminated`, and let the next one of the kind end the process where it is."""
    signal.signal(number, signal.SIG_DFL)
    raise Terminated(number)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def handled(handler, numbers: tuple[int, ...]):
    """Handle signals by `handler` inside, as before afterwards. Does nothing outside the main thread."""
    if not in_main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            # None: a handler that was not set from Python
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


class Requests:
    """The requests to end that a process has got while it could not end at once."""

    def __init__(self) -> None:
        self.number, self._when = None, 0.0

    def note(self, number: int, frame=None) -> None:
        """Handle a signal: keep the first one, end at the second."""
        now = time.monotonic()
        if self.number is None:
            self.number, self._when = number, now
        elif now - self._when > _SAME_REQUEST:
            raise_terminated(number)


def follow_parent(number: int, parent: int | None = None) -> None:
    """Have the kernel send this process a signal when its parent ends; on Linux alone.

    `parent`: its process id, where it is known, as the parent may have ended by now.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


_FORKS_END_WITH_US = False


def forks_end_with_us() -> None:
    """Have every process that is forked from this one, such as the workers of `datasets`, end when this one does.

    They leave the process group: a signal to all of it is for the run, which ends its workers itself.
    """

    global _FORKS_END_WITH_US
    if _FORKS_END_WITH_US:
        return
    _FORKS_END_WITH_US = True

    forking = [0]

    def in_child() -> None:
        for number in ending():
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        follow_parent(signal.SIGKILL, forking[0])

    os.register_at_fork(before=lambda: forking.__setitem__(0, os.getpid()), after_in_child=in_child)
