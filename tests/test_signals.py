import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain import signals
from posttrain.config import run_main

ROOT = Path(__file__).parents[1]
# nothing of the libraries is imported
ALONE = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import os, signal, time; from posttrain import signals\n"


@pytest.mark.parametrize("number", signals.ending())
def test_a_signal_runs_every_finally(number, capsys):
    done = []

    def main():
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        finally:
            done.append("finally")

    before = signal.getsignal(number)
    assert run_main(main) == 128 + number and done == ["finally"]
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err == f"ended by {signal.Signals(number).name}\n"


def test_the_same_signal_twice_in_a_moment_is_one_request():
    requests = signals.Requests()
    requests.note(signal.SIGTERM)
    requests.note(signal.SIGUSR1)
    assert requests.number == signal.SIGTERM


def ended(pid: int) -> bool:
    """Whether a process is gone, which may take the kernel a moment."""
    for _ in range(1000):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel of Linux")
def test_forks_end_with_a_parent_that_is_killed():
    code = ALONE + (
        "signals.forks_end_with_us()\n"
        "child = os.fork()\n"
        "if not child: time.sleep(60)\n"
        "print(child, os.getpgid(0), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline().split()[0])
        parent.kill()
    assert ended(child)
