"""The end of a recipe's process: its message, its exit code, and what ends with it."""

import atexit
import os
import re
import signal
import sys
import time
from collections.abc import Callable

from posttrain import exit_codes, outputs, signals, started
from posttrain.console import complain, guard_tracebacks
from posttrain.errors import PosttrainError, Preempted
from posttrain.visible import one_line


def run_main(main: Callable[[], object]) -> int:
    """Run `main` and return the process's exit code: 0, or that of the PosttrainError it ended in.

    The error is printed as one message, once a machine, with the rank where that is not the first. A signal that ends
    the process (SIGTERM, SIGHUP, SIGUSR1) becomes an exception, so that every `finally` runs, and the code is 128 and
    its number; after Ctrl-C 130. What the process forks ends with it, and it ends with its launcher. Output that
    nobody takes is dropped. A distributed run ends here, and so does a recipe that was told to end: taking the
    libraries apart takes seconds.
    """
    outputs.keep_going()
    guard_tracebacks()
    if signals.in_main_thread() and signals.is_launched():
        # which may have ended while the libraries were imported
        signals.follow_parent(signal.SIGTERM, started.PARENT)
    signals.forks_end_with_us()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        exit_codes.forget()
    with signals.ended_by_exceptions(), signals.counting_from_the_start():
        code = _code_of(main)
    is_waited_for = getattr(main, "__module__", None) == "__main__" and (code > 128 or code == Preempted.exit_code)
    if is_waited_for or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _leave(code)
    return code


def _code_of(main: Callable[[], object]) -> int:
    try:
        main()
    except (PosttrainError, Preempted) as error:
        signals.seen()
        return _told(str(error) if isinstance(error, Preempted) else f"error: {error}", error.exit_code)
    except (Exception, KeyboardInterrupt, signals.Terminated) as error:
        ended = signals.behind(error)
        signals.seen()
        if ended is None:
            if _is_of_a_lost_rank(error):
                return _told_of_a_lost_rank(error)
            exit_codes.keep(1)
            raise
        # as the shell has it for a program that Ctrl-C ended
        return _told(str(ended), ended.code) if isinstance(ended, signals.Terminated) else _told("interrupted", 130)
    signals.seen()
    return 0


# in which a launcher ends the other ranks, of which one has told the same
_OTHERS_TELL = 3.0
# of gloo and NCCL, in a rank that another one has left alone
_LOST = re.compile(r"Connection (closed|reset|refused)|Broken pipe|gloo|NCCL|Socket Timeout")


def _told(message: str, code: int) -> int:
    """Print why the process ends, and keep its code, which `accelerate launch` would turn into 1."""
    local, rank = os.environ.get("LOCAL_RANK", "0"), os.environ.get("RANK", "0")
    if local != "0":
        try:
            time.sleep(_OTHERS_TELL)
        except (signals.Terminated, KeyboardInterrupt):
            return code
    if rank != "0":
        message = f"rank {rank}: {message}"
    complain(message)
    exit_codes.keep(code)
    return code


def _is_of_a_lost_rank(error: BaseException) -> bool:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "DistBackendError" or _LOST.search(str(error)) is not None


def _told_of_a_lost_rank(error: BaseException) -> int:
    """Let the launcher see the rank that ended first; it then ends this one, which has nothing to tell."""
    try:
        time.sleep(_OTHERS_TELL)
    except (signals.Terminated, KeyboardInterrupt):
        return 128 + signal.SIGTERM
    return _told(f"error: the connection to another rank was lost ({one_line(error)}).", 1)


def _leave(code: int) -> None:
    if code:
        _end_children()
    # Threads of gloo still hold Python objects for a moment after their last collective. Where one lets go of them
    # while the interpreter is being torn down, the process aborts, and a run that is saved counts as failed.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_children() -> None:
    """End the processes of `multiprocessing` and its twin, for which their exit handlers would wait.

    One that was being started when the signal came is known to nobody else, such as the manager of `datasets`.
    """
    for name in ("multiprocess", "multiprocessing"):
        if name in sys.modules:
            for child in sys.modules[name].active_children():
                child.terminate()
