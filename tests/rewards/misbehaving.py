"""A verifier that does what verifiers must not, in a worker."""

import os
import time


def score(answer, gold):
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
