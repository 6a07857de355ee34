import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from posttrain import signals
from posttrain.recipe import run_main

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


@pytest.mark.parametrize("number, said", [(signal.SIGTERM, "ended by SIGTERM"), (signal.SIGINT, "interrupted")])
def test_an_error_of_a_finally_is_not_why_a_run_ended(number, said, capsys):
    """As where a pool of `datasets` is left."""

    def main():
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        finally:
            raise TimeoutError

    assert run_main(main) == 128 + number and capsys.readouterr().err == f"{said}\n"


def lost_in_a_finaliser(number):
    class Dying:
        def __del__(self):
            os.kill(os.getpid(), number)

    Dying()


def lost_in_a_callback(number):
    weakref.finalize(dying := type("Dying", (), {})(), os.kill, os.getpid(), number)
    del dying


def lost_in_a_library(number):
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("lose", [lost_in_a_finaliser, lost_in_a_callback, lost_in_a_library])
def test_a_signal_whose_exception_is_discarded_ends_the_run(lose, number, code, monkeypatch):
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: None)
    done = []

    def main():
        try:
            lose(number)
            time.sleep(30)
        finally:
            # that it is raised again must not interrupt what the first one runs
            time.sleep(3 * signals._REMINDED_EVERY)
            done.append("finally")

    handlers = [signal.getsignal(each) for each in (number, signals._REMINDER)]
    assert run_main(main) == code and done == ["finally"]
    assert [signal.getsignal(each) for each in (number, signals._REMINDER)] == handlers


@pytest.mark.parametrize("ours", ["first", "last"])
@pytest.mark.parametrize("hook", ["before", "after_in_parent"])
def test_a_signal_during_a_fork_ends_the_process_and_not_its_child(hook, ours):
    register = f"os.register_at_fork({hook}=lambda: os.kill(os.getpid(), signal.SIGHUP))", "signals.forks_end_with_us()"
    code = ALONE + (
        "\n".join(register if ours == "last" else reversed(register)) + "\n"
        "with signals.ended_by_exceptions():\n"
        "    child = os.fork()\n"
        "    if not child: time.sleep(0.5); os._exit(7)\n"
        "    try: time.sleep(30)\n"
        "    finally: print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (129, "7\n"), found.stderr


def test_a_signal_to_a_child_whose_hooks_of_the_fork_still_run_ends_it():
    """As where a pool is closed at once: else its owner waits for ever."""
    code = ALONE + (
        "os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "signals.forks_end_with_us()\n"
        "with signals.ended_by_exceptions():\n"
        "    child = os.fork()\n"
        "    if not child: time.sleep(30); os._exit(7)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "    print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout == "-15\nset()\n", found.stderr


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_main(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel of Linux")
def test_forks_of_a_thread_outlive_it_and_hear_no_signal_of_the_run():
    code = ALONE + (
        "import threading\n"
        "signals.forks_end_with_us()\n"
        "def fork():\n"
        "    global child\n"
        "    child = os.fork()\n"
        "    if not child: time.sleep(0.5); os._exit(7)\n"
        "thread = threading.Thread(target=fork); thread.start(); thread.join()\n"
        "while os.getpgid(child) != child: time.sleep(0.001)\n"
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN); os.killpg(0, signal.SIGUSR1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code], process_group=0).returncode == 7
