"""Holds the core suite to its budget of processor seconds: `python -m tests.budget TABLE`.

TABLE is what a run wrote with POSTTRAIN_TEST_CPU. Seconds of a processor do not grow with what else runs beside, but
with how slow it is: limits are stretched by the time that a fixed piece of work takes here, never shrunk. No test
reads them; the suite is green or red without. They leave room: the suite takes 240 s where they were set.
"""

import json
import sys
import time
from collections import Counter

A_TEST, A_FILE, IN_ALL = 8.0, 60.0, 400.0
# launches and killed runs: one run serves many tests, and counts to the first of them
LAUNCHED = {"tests/distributed/test_sharded.py": 45.0, "tests/interruption/test_killed_runs.py": 30.0}
# of the first test of a process, which imports the libraries
IMPORTS = 8.0
# seconds of `work` on the machine that the limits were set on
REFERENCE = 0.6


def work() -> float:
    """Processor seconds of a fixed piece of work of the suite's kind: Python objects and small matrices."""
    import torch

    matrix = torch.ones(64, 64) / 64
    before = time.process_time()
    for i in range(60_000):
        json.loads(json.dumps({"step": i, "names": ["a", "b", "c"], "loss": i / 7}))
        if not i % 20:
            matrix = torch.tanh(matrix @ matrix)
    return time.process_time() - before


def faults(rows: list[tuple[str, float]], stretch: float) -> list[str]:
    """What is above its limit, in words."""
    files, found = Counter(), []
    for name, seconds in rows:
        file = name.split("::")[0]
        files[file] += seconds
        limit = (LAUNCHED.get(file, A_TEST) + IMPORTS) * stretch
        if seconds > limit:
            found.append(f"{name} took {seconds:.1f} s, above {limit:.1f}")
    for file, seconds in files.items():
        limit = (max(A_FILE, 2 * LAUNCHED.get(file, 0.0)) + IMPORTS) * stretch
        if seconds > limit:
            found.append(f"{file} took {seconds:.1f} s, above {limit:.1f}")
    if files.total() > IN_ALL * stretch:
        found.append(f"the suite took {files.total():.1f} s, above {IN_ALL * stretch:.1f}")
    return found


def main(table: str) -> int:
    with open(table) as file:
        rows = [tuple(json.loads(line)) for line in file]
    stretch = max(1.0, work() / REFERENCE)
    print(f"{len(rows)} tests, {sum(seconds for _, seconds in rows):.1f} s of processor; limits x {stretch:.2f}")
    for name, seconds in sorted(rows, key=lambda row: -row[1])[:15]:
        print(f"{seconds:8.2f}  {name}")
    found = faults(rows, stretch)
    for fault in found:
        print(f"above budget: {fault}")
    return 1 if found or not rows else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
