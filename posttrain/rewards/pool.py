"""Worker processes for verifiers that can hang, crash or use signals.

Workers are fresh interpreters that run `posttrain.rewards.worker`, one JSON text a line on their standard input and
output. Each call has a number, which its reply repeats: a reply to another call than the one waited for is dropped.
`multiprocessing`'s spawn would import the user's script again in each of them, torch included, and start
workers from within workers where the script has no `__main__` guard; so they are started as plain commands.
"""

import contextlib
import itertools
import json
import math
import os
import signal
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
from posttrain.rewards.keeper import END

# Seconds for an interpreter to start and import its verifier: about two, on a busy machine more.
START_TIMEOUT = 120.0
# Workers in a row that are killed while they start, after which no other is started.
STARTS = 3
# Seconds the worker has to end an overlong sample by itself before it is killed.
GRACE = 1.0
# Seconds for idle workers to leave by themselves at the end.
CLOSE_TIMEOUT = 1.0
# Seconds a keeper has to end what its worker has started.
KILL_TIMEOUT = 5.0

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

    The processes that a worker has started end with it, see `posttrain.rewards.keeper`.
    """

    def __init__(self, module: str, workers: int, timeout: float):
        self.module, self.size, self.timeout = module, workers, timeout
        self._lock = threading.RLock()
        self._workers: list[_Worker] = []
        self._numbers = itertools.count()
        self._pid = os.getpid()
        self._finalizer = None
        # in a row, while they started
        self._killed = 0

    @property
    def pids(self) -> list[int]:
        """Of the live workers, in the order of their slots."""
        return [worker.pid for worker in self._workers]

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
                    self._receive({})
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
            outcomes: dict[int, Outcome] = {}
            waiting = deque(range(len(calls)))
            try:
                while len(outcomes) < len(calls):
                    for slot, worker in enumerate(self._workers):
                        if waiting and worker.ready and worker.index is None:
                            request = {"function": function, "arguments": calls[waiting[0]], "timeout": self.timeout}
                            number = next(self._numbers)
                            if worker.send(request, number, waiting[0], self.timeout + GRACE):
                                waiting.popleft()
                            else:
                                self._replace(slot)
                    self._receive(outcomes)
            except BaseException:
                # The workers may be at calls that nobody waits for.
                self.close()
                raise
            return [outcomes[index] for index in range(len(calls))]

    def _new_worker(self) -> "_Worker":
        return _Worker(self.module)

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = self._new_worker()

    def _receive(self, outcomes: dict[int, Outcome]) -> None:
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
                if "pid" in reply:
                    worker.pid, worker.ready, worker.deadline, self._killed = reply["pid"], True, math.inf, 0
                elif reply.pop("call") == worker.call:
                    leaves = reply.pop("leaves")
                    outcomes[worker.index] = Outcome(**reply)
                    worker.call, worker.index, worker.deadline = None, None, math.inf
                    if leaves:
                        self._replace(slot)
                        break
        for slot, worker in enumerate(self._workers):
            if worker.deadline <= time.monotonic():
                if not worker.ready:
                    raise EnvironmentIssue(f"a worker for {self.module} did not start in {START_TIMEOUT:g} s.")
                outcomes[worker.index] = Outcome(timed_out=True)
                self._replace(slot)

    def _has_died(self, slot: int, outcomes: dict[int, Outcome]) -> None:
        worker = self._workers[slot]
        code = worker.process.wait()
        if not worker.ready:
            self._killed += 1
            if code < 0 and self._killed < STARTS:
                return self._replace(slot)
            how = f"exit code {code}"
            if code < 0:
                how = f"{signal.Signals(-code).name}, {self._killed} times in a row, as where memory runs out"
            raise EnvironmentIssue(f"a worker for {self.module} ended while it started ({how}).")
        if worker.index is not None:
            outcomes[worker.index] = Outcome(error=f"the worker died (exit code {code})")
        self._replace(slot)


class _Worker:
    """One process, the call it is at and the time by which it must have answered.

    call: the call's number. index: its place among those of `map`. Both are None when the worker is idle.
    """

    def __init__(self, module: str):
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, json.dumps(sys.path), str(os.getpid()), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # signals to the trainer's group are the trainer's, which may have a step to finish
            process_group=0,
            # arithmetic libraries would start a thread for each core in every worker
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        # the keeper's, until the worker has said its own
        self.pid = self.process.pid
        self.ready = False
        self.call: int | None = None
        self.index: int | None = None
        self.deadline = time.monotonic() + START_TIMEOUT
        self._unread = b""

    def send(self, request: dict, number: int, index: int, seconds: float) -> bool:
        """Hand over a call; False if the process has died."""
        if self.process.poll() is not None:
            return False
        line = memoryview(json.dumps(request | {"call": number}).encode() + b"\n")
        try:
            while line:
                line = line[self.process.stdin.write(line) :]
        except OSError:
            return False
        self.call, self.index, self.deadline = number, index, time.monotonic() + seconds
        return True

    def read(self) -> list[dict] | None:
        """Return the replies that have come in whole; None at the end of the process."""
        part = os.read(self.process.stdout.fileno(), 1 << 16)
        if not part:
            return None
        *lines, self._unread = (self._unread + part).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        """End the process and all that it has started."""
        self.process.send_signal(END)
        self.leave(time.monotonic() + KILL_TIMEOUT)

    def leave(self, deadline: float) -> None:
        """Wait for the end of a process that was told to leave; kill it at the deadline."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.send_signal(END)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(KILL_TIMEOUT)
        if self.process.poll() in (None, -signal.SIGKILL) and self.ready:
            # a keeper that was killed itself has ended its worker, but not what that had started
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)
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
