"""A verifier that does what verifiers must not, in a worker."""

import os
import signal
import subprocess
import time
from pathlib import Path


def score(answer, gold):
    answer, _, file = answer.partition(" leaving ")
    if file:
        # one in the worker's group, one in a session of its own
        left = [subprocess.Popen(["sleep", "300"], start_new_session=own).pid for own in (False, True)]
        Path(file).write_text(" ".join(map(str, left)))
    if answer == "sleep":
        time.sleep(60)
    if answer == "deaf":
        # one call into C that no alarm interrupts
        sum(range(10**12))
    if answer == "swallow":
        for _ in range(600):
            try:
                time.sleep(0.1)
            except BaseException:
                pass
    if answer == "die":
        os._exit(7)
    if answer == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if answer == "fork" and not os.fork():
        raise RuntimeError("a fork that comes back")
    if answer == "print":
        print("not a reply")
    if answer == "pid":
        return os.getpid()
    if answer == "raise" or gold == "bad":
        raise RuntimeError(f"cannot read {answer}")
    if answer == "memory":
        return len(bytearray(64 << 30))
    return float(answer == gold)


def accepts_gold(gold):
    return score(gold, gold) == 1.0
