"""Worker processes for verifiers that can hang, crash or use signals.

Workers are fresh interpreters that run `posttrain.rewards.worker`, one JSON text a line on their standard input and
output. `multiprocessing`'s spawn would import the user's script again in each of them, torch included, and start
workers from within workers where the script has no `__main__` guard; so they are started as plain commands.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import NamedTuple

from posttrain.errors import EnvironmentIssue

# Seconds for an interpreter to start and import its verifier: about two, on a busy machine more.
START_TIMEOUT = 120.0
# Seconds the worker has to end an overlong sample by itself before it is killed.
GRACE = 1.0
# Seconds for idle workers to leave by themselves at the end.
CLOSE_TIMEOUT = 1.0

_COMMAND = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from posttrain.rewards.worker import main; main()"


class Outcome(NamedTuple):
    """What became of one call: a value, a timeout, or an error.

    answer_at_fault: the verifier met an error on the answer, but accepts the gold answer itself.
    """

    value: float | str | None = None
    timed_out: bool = False
    error: str | None = None
    answer_at_fault: bool = False


class WorkerPool:
    """`workers` processes that call the functions of one module, with a timeout for each call.

    Args:
        module: importable name of a module with functions of JSON values.
        timeout: seconds a call. The worker stops itself by an alarm; GRACE seconds later it is killed and replaced.
    """

    def __init__(self, module: str, workers: int, timeout: float):
        self.module, self.size, self.timeout = module, workers, timeout
        self._lock = threading.RLock()
        self._workers: list[_Worker] = []
        self._pid = os.getpid()
        self._finalizer = None

    @property
    def pids(self) -> list[int]:
        """Of the live workers, in the order of their slots."""
        return [worker.process.pid for worker in self._workers]

    def start(self) -> None:
        """Start the workers and wait until they have imported the verifier. A second call does nothing.

        Raises EnvironmentIssue where that fails.
        """
        with self._lock:
            if self._pid != os.getpid():
                # A forked process: the workers are its parent's.
                self._workers, self._pid = [], os.getpid()
            if self._workers:
                return
            self._finalizer = weakref.finalize(self, _shut_down, self._workers, self._pid)
            try:
                self._workers += [self._new_worker() for _ in range(self.size)]
                while any(not worker.ready for worker in self._workers):
                    self._receive([])
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the workers, within about a second. The next call starts new ones."""
        with self._lock:
            if self._finalizer is not None:
                self._finalizer()
            if self._pid == os.getpid():
                self._workers = []

    def map(self, function: str, calls: Sequence[dict]) -> list[Outcome]:
        """Call `function(**call)` for each of `calls` in the workers; outcomes in the order of `calls`."""
        with self._lock:
            if not calls:
                return []
            self.start()
            outcomes: list[Outcome | None] = [None] * len(calls)
            waiting = deque(range(len(calls)))
            try:
                while any(outcome is None for outcome in outcomes):
                    for slot, worker in enumerate(self._workers):
                        if waiting and worker.ready and worker.index is None:
                            request = {"function": function, "arguments": calls[waiting[0]], "timeout": self.timeout}
                            if worker.send(request, waiting[0], self.timeout + GRACE):
                                waiting.popleft()
                            else:
                                self._replace(slot)
                    self._receive(outcomes)
            except BaseException:
                # Replies that are still to come would be taken for those of the next call.
                self.close()
                raise
            return outcomes

    def _new_worker(self) -> "_Worker":
        return _Worker(self.module)

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = self._new_worker()

    def _receive(self, outcomes: list) -> None:
        """Wait for what comes first, a reply or a deadline, and deal with all that has come."""
        by_file = {worker.process.stdout: slot for slot, worker in enumerate(self._workers)}
        nearest = min(worker.deadline for worker in self._workers)
        left = None if nearest == math.inf else max(0.0, nearest - time.monotonic())
        for file in wait(list(by_file), left):
            slot = by_file[file]
            worker = self._workers[slot]
            replies = worker.read()
            if replies is None:
                self._has_died(slot, outcomes)
                continue
            for reply in replies:
                if "failed" in reply:
                    raise EnvironmentIssue(
                        f"the verifier {self.module} cannot be loaded in its worker: {reply['failed']}"
                    )
                if worker.index is not None:
                    outcomes[worker.index] = Outcome(**reply)
                worker.ready, worker.index, worker.deadline = True, None, math.inf
        for slot, worker in enumerate(self._workers):
            if worker.deadline <= time.monotonic():
                if not worker.ready:
                    raise EnvironmentIssue(f"a worker for {self.module} did not start in {START_TIMEOUT:g} s.")
                outcomes[worker.index] = Outcome(timed_out=True)
                self._replace(slot)

    def _has_died(self, slot: int, outcomes: list) -> None:
        worker = self._workers[slot]
        code = worker.process.wait()
        if not worker.ready:
            raise EnvironmentIssue(f"a worker for {self.module} ended while it started (exit code {code}).")
        if worker.index is not None:
            outcomes[worker.index] = Outcome(error=f"the worker died (exit code {code})")
        self._replace(slot)


class _Worker:
    """One process, the call it is at (`index`, None when idle) and the time by which it must have answered."""

    def __init__(self, module: str):
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, json.dumps(sys.path), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # a signal to all of a run's group is for the run, also while the worker starts
            process_group=0,
            # arithmetic libraries would start a thread for each core in every worker
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        self.ready = False
        self.index: int | None = None
        self.deadline = time.monotonic() + START_TIMEOUT
        self._unread = b""

    def send(self, request: dict, index: int, seconds: float) -> bool:
        """Hand over a call; False if the process has died."""
        line = memoryview(json.dumps(request).encode() + b"\n")
        try:
            while line:
                line = line[self.process.stdin.write(line) :]
        except OSError:
            return False
        self.index, self.deadline = index, time.monotonic() + seconds
        return True

    def read(self) -> list[dict] | None:
        """Return the replies that have come in whole; None at the end of the process."""
        part = os.read(self.process.stdout.fileno(), 1 << 16)
        if not part:
            return None
        *lines, self._unread = (self._unread + part).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._close_pipes()

    def leave(self, deadline: float) -> None:
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()


def _shut_down(workers: list[_Worker], pid: int) -> None:
    if pid != os.getpid():
        return
    for worker in workers:
        # the end of its input is what a worker leaves at
        worker.process.stdin.close()
    deadline = time.monotonic() + CLOSE_TIMEOUT
    for worker in workers:
        worker.leave(deadline)
    workers.clear()
