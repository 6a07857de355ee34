"""What a process does when it is told to end: an exception that runs every `finally`, and children that end with it."""

import _thread
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
    _insist(Terminated, number)


def raise_interrupted(number: int, frame=None) -> None:
    """Handle Ctrl-C: raise KeyboardInterrupt, as Python does."""
    _insist(KeyboardInterrupt)


# Does nothing to a process that has no handler for it
_REMINDER = getattr(signal, "SIGURG", None)
_REMINDED_EVERY = 0.1
# the process that ends by exceptions, and what its `main` has not seen yet of a signal: an exception's kind, arguments
_insisting: list = [None, None]
# the process of whose forks hooks are running
_in_fork_hooks = [None]


@contextlib.contextmanager
def ended_by_exceptions():
    """Raise, inside, `Terminated` at a signal that ends the process and KeyboardInterrupt at Ctrl-C, until one is seen.

    One that is raised in a hook, a finaliser or a callback of C code is discarded there, and libraries catch others. So
    it is raised again for as long as nothing handles it and `seen` was not called. Outside the main thread this does
    nothing.
    """
    if not in_main_thread() or _REMINDER is None or _insisting[0] == os.getpid():
        with handled(raise_terminated, ending()):
            yield
        return
    # a handler of the caller's own stays
    interrupts = (signal.SIGINT,) if signal.getsignal(signal.SIGINT) is signal.default_int_handler else ()
    with handled(raise_terminated, ending()), handled(raise_interrupted, interrupts), handled(_remind, (_REMINDER,)):
        _insisting[:] = os.getpid(), None
        try:
            yield
        finally:
            _insisting[:] = None, None


def seen() -> None:
    """Tell that the exception of a signal has come to where the process ends by it."""
    _insisting[1] = None


def _insist(kind: type[BaseException], *arguments) -> None:
    # not in a process that was forked from it
    if _insisting[0] == os.getpid():
        is_first, _insisting[1] = _insisting[1] is None, (kind, arguments)
        if is_first:
            # a `threading.Thread` takes locks that what was interrupted may hold
            _thread.start_new_thread(_send_reminders, (threading.main_thread().ident,))
        if _in_fork_hooks[0] == os.getpid():
            return
    raise kind(*arguments)


def _send_reminders(thread: int) -> None:
    while True:
        time.sleep(_REMINDED_EVERY)
        if _insisting[1] is None:
            return
        signal.pthread_kill(thread, _REMINDER)


def _remind(number: int, frame=None) -> None:
    unseen = _insisting[1]
    # while a `finally` runs because of it, it is on its way
    if unseen is not None and _in_fork_hooks[0] != os.getpid() and behind(sys.exception()) is None:
        kind, arguments = unseen
        raise kind(*arguments)


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
    held = threading.local()

    def before() -> None:
        forking[:] = os.getpid(), in_main_thread()
        if forking[1]:
            _in_fork_hooks[0] = forking[0]
        # one that the child got before it has handlers of its own would be lost
        held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*ending(), signal.SIGINT})

    def in_parent() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, held.mask)
        if in_main_thread():
            _in_fork_hooks[0] = None

    def in_child() -> None:
        if signal.getsignal(signal.SIGINT) is raise_interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in ending():
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        # to the kernel, a thread is the parent of what it forks, and others end before the process does
        if forking[1]:
            follow_parent(signal.SIGKILL, forking[0])
        signal.pthread_sigmask(signal.SIG_SETMASK, held.mask)

    os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)
