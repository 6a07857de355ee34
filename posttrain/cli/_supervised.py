"""A command in a process group of its own, to which the signals of this process are passed on."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

from posttrain import exit_codes, signals

# Seconds that what a killed command leaves behind has to end by itself
LEFT = 60.0
# Seconds from a second signal, at which everything ends at once, until all is killed
AT_ONCE = 10.0


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command and return its exit code, or 128 and the number of the signal that ended it.

    A code that says why a run ended, such as 75, stays after a signal as well.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 go on to all processes of its group; some seconds after a second one everything
    is killed, and so is what the command leaves when it has ended. As the first process of a container, this one also
    reaps what others leave to it.
    """
    got = Forwarded()
    others = _children()
    signals.adopt_orphans()
    with signals.handled(got.forward, (*signals.ending(), signal.SIGINT)):
        child = subprocess.Popen(command, env=environment, process_group=0)
        got.begin(child.pid)
        code = _wait(child)
        got.group = None
        # ranks whose launcher was killed are told so by the kernel, and save a checkpoint
        _end_others(_children() - others, LEFT if code < 0 else 0.0)
        _signal(child.pid, signal.SIGKILL)
    if code < 0:
        return 128 - code
    return 128 + got.numbers[0] if got.numbers and code and code not in exit_codes.OWN else code


class Forwarded:
    """The signals that were passed on to a process group, or are going to be once it is there."""

    def __init__(self) -> None:
        self.group, self.numbers, self._first, self._timer = None, [], 0.0, None

    def begin(self, group: int) -> None:
        self.group = group
        for number in self.numbers:
            # came while it was being started
            _signal(group, number)

    def forward(self, number: int, frame=None) -> None:
        """Handle a signal."""
        self.numbers.append(number)
        if self.group is not None:
            _signal(self.group, number)
        now = time.monotonic()
        if len(self.numbers) == 1:
            self._first = now
        elif now - self._first > signals.SAME_REQUEST and self._timer is None:
            self._timer = threading.Timer(AT_ONCE, self._kill)
            self._timer.daemon = True
            self._timer.start()

    def _kill(self) -> None:
        import psutil

        if self.group is None:
            return
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.group).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        _signal(self.group, signal.SIGKILL)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _wait(child: subprocess.Popen) -> int:
    if os.getpid() != 1:
        return child.wait()
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode


def _children() -> set:
    import psutil

    return set(psutil.Process().children())


def _end_others(left: set, seconds: float) -> None:
    """Give processes that were left to this one so long to end, then kill them."""
    import psutil

    _, still = psutil.wait_procs(left, timeout=seconds)
    for process in still:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(still, timeout=AT_ONCE)
