"""Time and memory that work on what strangers wrote may take in this process."""

import contextlib
import os
import signal
import threading
import time
from types import SimpleNamespace


class Overtime(BaseException):
    """Raised in the midst of what runs too long, which has no way to catch it."""


@contextlib.contextmanager
def in_time(seconds: float):
    """Raise Overtime after `seconds` of this thread's time, in the main thread and where there are alarms.

    Regular expressions are stopped in the midst of a match; most other single calls of C code when they are done. While
    `stopped` of what this yields is true, the time goes on and nothing is raised.
    """
    clock = SimpleNamespace(stopped=False)
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield clock
        return
    began = time.thread_time()

    def ring(*_):
        left = seconds - (time.thread_time() - began)
        # the machine, not what runs here, took the time, or it is another's turn
        if left > 0 or clock.stopped:
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.05))
            return
        raise Overtime

    before = signal.signal(signal.SIGALRM, ring)
    others = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield clock
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def in_memory(most: int):
    """Let the process have `most` bytes of addresses more than it has, where there is `/proc`.

    What asks for more raises MemoryError.
    """
    try:
        import resource

        with open("/proc/self/statm", "rb") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and soft <= now + most or hard != resource.RLIM_INFINITY and hard < now + most:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (now + most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
