"""What a process does when it is told to end: an exception that runs every `finally`, and children that end with it."""

import contextlib
import os
import signal
import sys
import threading
import time

from posttrain import started

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# a launcher that gets the same signal passes it on at once, or dies of it, which is no second request
SAME_REQUEST = 1.0

_LAUNCHERS = (
    "posttrain.cli.launcher", "accelerate", "accelerate.commands.launch", "accelerate-launch", "torchrun",
    "torch.distributed.run", "deepspeed",
)  # fmt: skip
# when a recipe's process began, by `time.monotonic`; None in a program of somebody else's
began: float | None = None


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
    # the kernel keeps a container's first process from a signal that it has no handler for
    signal.signal(number, signal.SIG_DFL if os.getpid() != 1 else lambda number, frame: os._exit(128 + number))
    raise Terminated(number)


def behind(error: BaseException) -> BaseException | None:
    """Return the `Terminated` or KeyboardInterrupt that an error is, or that it came of while a `finally` ran."""
    while error is not None and not isinstance(error, Terminated | KeyboardInterrupt):
        error = error.__context__
    return error


@contextlib.contextmanager
def counting_from_the_start():
    """Count a limit of time from the start of the process inside."""
    global began
    import psutil

    began = time.monotonic() - max(0.0, time.time() - psutil.Process().create_time())
    try:
        yield
    finally:
        began = None


def is_launched() -> bool:
    """Return whether the process was started by a launcher, and not from a shell that it may outlive."""
    return any(os.path.basename(word) in _LAUNCHERS or word in _LAUNCHERS for word in started.PARENTS_WORDS[:4])


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def handled(handler, numbers: tuple[int, ...]):
    """Handle signals by `handler` inside, as before afterwards. Does nothing outside the main thread.

    What is ignored stays ignored: `nohup` asks for that, as do shells for what runs in the background.
    """
    if not in_main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) != signal.SIG_IGN
    }
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
        elif now - self._when > SAME_REQUEST:
            raise_terminated(number)


def follow_parent(number: int, parent: int | None = None) -> None:
    """Have the kernel send this process a signal when its parent ends; on Linux alone.

    `parent`: its process id, where it is known, as the parent may have ended by now.
    """
    parent = parent or os.getppid()
    if _prctl(_PR_SET_PDEATHSIG, int(number)) and os.getppid() != parent:
        os.kill(os.getpid(), number)


def adopt_orphans() -> bool:
    """Have the kernel give this process the children of its children that outlive them; returns whether it does."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def heed_parent_alone(number: int) -> None:
    """Have this process end at a signal that its parent sends, and at nobody else's; where there is `sigwaitinfo`.

    What it starts has the signal blocked, unless it says otherwise.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})

    def wait() -> None:
        while signal.sigwaitinfo({number}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, name="posttrain-signals", daemon=True).start()


def _prctl(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    return ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0


_FORKS_END_WITH_US = False


def forks_end_with_us() -> None:
    """Have every process that is forked from this one, such as the workers of `datasets`, end when this one does.

    They leave the process group: a signal to all of it is for the run, which ends its workers itself, by SIGTERM. The
    others that end a run mean nothing to them.
    """
    global _FORKS_END_WITH_US
    if _FORKS_END_WITH_US:
        return
    _FORKS_END_WITH_US = True

    forking = [0, False]

    def before() -> None:
        forking[:] = os.getpid(), in_main_thread()

    def in_child() -> None:
        for number in ending():
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        # to the kernel, a thread is the parent of what it forks, and others end before the process does
        if forking[1]:
            follow_parent(signal.SIGKILL, forking[0])

    os.register_at_fork(before=before, after_in_child=in_child)
