"""What stands between the pool and a worker, so that neither the worker nor a process it has started is left behind.

The command that the pool starts forks at once. The child is the worker, the leader of a process group. The parent, its
keeper, waits for the first of these: the worker ends, the pool's process ends, the pool sends END. Then it kills the
worker with all that was started from it, and exits as the worker did. Standard library only, where it has `waitid`.

On Linux the keeper is told of its parent's end by a signal, and inherits the orphans among the worker's descendants, so
that those in sessions of their own end as well. Elsewhere it looks for its parent every second, and ends the group.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

# What the pool asks the keeper with to end the worker. A scheduler sends the others to all processes of a job, the
# keeper included, and means the trainer.
END = signal.SIGUSR2
_WAKE = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, END}
# Seconds between two looks for the parent.
_LOOK = 1.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def keep(parent: int) -> None:
    """Fork, and return in the child, the worker. The other process is its keeper and does not return.

    Args:
        parent: id of the pool's process, which started this one.
    """
    keeper = os.getpid()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAKE)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    worker = os.fork()
    if worker:
        os._exit(_exit_as(_watch(worker, parent)))
    os.setpgid(0, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def children_of(pid: int) -> set[int]:
    """Return the processes started by another that run; empty where the system has no /proc."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # a process may end between the two calls
        with contextlib.suppress(OSError):
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.add(int(stat.parent.name))
    return found


def _watch(worker: int, parent: int) -> int:
    """Wait until the worker is to end or has ended, end what is left of it, and return its status."""
    with contextlib.suppress(OSError):
        # either of the two comes first
        os.setpgid(worker, worker)
    # the pool reads the end of the worker's output off this pipe, and the worker's input ends with the pool
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    while not _has_ended(worker) and os.getppid() == parent:
        if _next_signal() == END:
            break
    with contextlib.suppress(OSError):
        os.killpg(worker, signal.SIGKILL)
    status = 0
    while True:
        for child in children_of(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
        try:
            pid, ended = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        if pid == worker:
            status = ended


def _has_ended(worker: int) -> bool:
    """Return whether the worker has ended; it is not waited for, so that its number stays its group's."""
    if not hasattr(os, "waitid"):
        # macOS before Python 3.13, where no orphans are inherited
        import psutil

        return psutil.Process(worker).status() == psutil.STATUS_ZOMBIE
    while True:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None or ended.si_pid == worker:
            return ended is not None
        os.waitpid(ended.si_pid, 0)


def _next_signal() -> int | None:
    if hasattr(signal, "sigtimedwait"):
        told = signal.sigtimedwait(_WAKE, _LOOK)
        return told and told.si_signo
    pending = signal.sigpending() & _WAKE
    if pending:
        return signal.sigwait({END} if END in pending else pending)
    time.sleep(_LOOK / 10)
    return None


def _exit_as(status: int) -> int:
    """Return the worker's exit code; where a signal ended it, end by the same one."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
        # a signal that ends no process by default
        return 128 - code
    return code


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)
