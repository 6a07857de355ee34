"""A command in a process group of its own, to which the signals of this process are passed on."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from posttrain import signals


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command and return its exit code, or 128 and the number of the signal that ended it.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 go on to all processes of its group. What is left of the group when the command
    has ended is killed. As the first process of a container, this one also reaps what others leave to it.
    """
    child, got = None, []

    def pass_on(number: int, frame) -> None:
        got.append(number)
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)

    with signals.handled(pass_on, (*signals.ending(), signal.SIGINT)):
        child = subprocess.Popen(command, env=environment, process_group=0)
        for number in got:
            # came while it was being started
            os.killpg(child.pid, number)
        code = _wait(child)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    if code < 0:
        return 128 - code
    return 128 + got[0] if got and code else code


def _wait(child: subprocess.Popen) -> int:
    if os.getpid() != 1:
        return child.wait()
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode
