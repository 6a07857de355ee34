"""What runs in a worker process: read a call, make it within its time, write what became of it.

Standard library only; the verifier's module is imported when its name arrives.
"""

import contextlib
import importlib
import json
import math
import os
import resource
import signal
import sys
import warnings

from posttrain.rewards.keeper import children_of, keep

# Bytes of address space. An answer such as 9^(9^9) would take all the machine has.
MEMORY = 4 << 30
# An alarm that a verifier's `except` swallowed rings again after so many seconds.
AGAIN = 0.25


# Sent by schedulers to all processes of a job. What a worker is told to do comes from its parent.
_FOR_THE_TRAINER = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Overtime(BaseException):
    """Not an Exception, which verifiers catch."""


def main() -> None:
    """Serve until the input ends. The command line's last two words: the pool's process, the verifier's module."""
    keep(parent=int(sys.argv[-2]))
    own = os.getpid()
    requests, replies = _own_pipes()
    # Ctrl-C is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _ring)
    for number in _FOR_THE_TRAINER:
        signal.signal(number, lambda number, frame: _pass_over(number, own))
    warnings.simplefilter("ignore")
    _limit(resource.RLIMIT_AS, MEMORY)

    def reply(**values) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    try:
        module = importlib.import_module(sys.argv[-1])
    except Exception as error:
        reply(failed=error_text(error))
        return
    reply(pid=own)
    with contextlib.suppress(BrokenPipeError):
        for line in requests:
            request = json.loads(line)
            number, before = request.pop("call"), _started()
            outcome = serve(module, **request)
            if os.getpid() != own:
                # A fork that the verifier did not end: the reply is its parent's.
                os._exit(1)
            leaves = "value" not in outcome and not _started() <= before
            reply(call=number, leaves=leaves, **outcome)
    # Taking sympy's caches apart would hold up the parent's exit.
    os._exit(0)


def serve(module, function: str, arguments: dict, timeout: float) -> dict:
    """Return the fields of an Outcome: value, timed_out, or error and answer_at_fault."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    # The kernel ends a worker that computes on, deaf to alarms, after its parent was killed.
    _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + 2 * timeout) + 5)
    try:
        return _in_time(timeout, lambda: {"value": getattr(module, function)(**arguments)})
    except Overtime:
        return {"timed_out": True}
    except Exception as error:
        outcome = {"error": error_text(error)}
    with contextlib.suppress(Exception, Overtime):
        accepts = getattr(module, "accepts_gold", None)
        if function == "score" and accepts is not None:
            outcome["answer_at_fault"] = _in_time(AGAIN, lambda: bool(accepts(arguments["gold"])))
    return outcome


def _in_time(seconds: float, call):
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def error_text(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _started() -> set[int]:
    """Return the processes that the worker has started and that run."""
    if not hasattr(os, "waitid"):
        return children_of(os.getpid())
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return set()
    return children_of(os.getpid())


def _pass_over(number: int, worker: int) -> None:
    """Do nothing in the worker; in a process forked from it, what the signal does by default."""
    if os.getpid() != worker:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _ring(signum, frame):
    raise Overtime


def _limit(kind: int, amount: int) -> None:
    # Some systems refuse a limit of this kind; the parent's timeout holds there.
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


def _own_pipes():
    """Return the pipes to the parent, out of the reach of a library that prints."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, replies
