"""A process that has imported the libraries once, and is forked for each run that is to be a process of its own.

A fresh interpreter spends seven seconds on imports. The server, `python -m tests.warm`, runs no model before it forks:
autograd cannot be forked once it has run.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

from tests import sparing

ROOT = Path(__file__).parents[1]


class Child:
    """A forked run. `returncode` is None until it has ended; negative for the signal that ended it."""

    def __init__(self, server: "Server", pid: int) -> None:
        self._server, self.pid, self.returncode = server, pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask(poll=self.pid)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.returncode = self._server.ask(wait=self.pid)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self._server.ask(wait=self.pid)
        return self.returncode


SERVERS: list["Server"] = []


class Server:
    def __init__(self) -> None:
        SERVERS.append(self)
        # ninja, which DeepSpeed compiles with, lies beside the interpreter
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            cwd=ROOT,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, function: str, *arguments: str, log: Path, **environment: str) -> Child:
        """Fork a process that calls `module:function` with `arguments`; what it prints is added to `log`."""
        request = dict(start=function, arguments=arguments, log=str(log), environment=environment)
        return Child(self, self.ask(**request))

    def ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the warm process has ended"
        return json.loads(answer)

    def cpu_seconds(self) -> float:
        """Of the process and of its forks that have ended."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        if not stat.exists():
            return 0.0
        fields = stat.read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        SERVERS.remove(self)
        # not by the end of the pipe, which what this process has forked holds open
        self._process.communicate(json.dumps({"end": True}) + "\n")


def launched(config: str, function: str, *arguments: str) -> None:
    """`accelerate launch --config_file config`, whose ranks are forks of this process and call `module:function`."""
    import torch.distributed.run
    from accelerate.commands import launch

    def forked(args) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = int(args.nproc_per_node)
        ranks = {}
        for rank in range(world):
            place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
            place |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            ranks[_fork(function, arguments, {name: str(value) for name, value in place.items()})] = rank
        while ranks:
            pid, status = os.wait()
            rank = ranks.pop(pid)
            if status:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
                raise RuntimeError(f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}")

    torch.distributed.run.run = forked
    launch.launch_command(launch.launch_command_parser().parse_args(["--config_file", config, function]))


def _fork(function: str, arguments, environment: dict, log: str | None = None) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(environment)
        if log:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(file, stream)
        module, name = function.split(":")
        getattr(importlib.import_module(module), name)(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    # what libraries print must not stand among the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import deepspeed

    # the forks talk over gloo: what DeepSpeed would compile for their messages takes a minute of a processor
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for module in ("tests.distributed.worker", "tests.interruption.child"):
        importlib.import_module(module)
    patch = SimpleNamespace(setattr=setattr)
    sparing.spare(patch)
    sparing.check_rows_once(patch)
    # what is imported need not be gone over, nor its pages copied, in each fork
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "end" in request:
            break
        if "start" in request:
            answer = _fork(request["start"], request["arguments"], request["environment"], request["log"])
        else:
            pid, status = os.waitpid(request.get("poll") or request["wait"], os.WNOHANG if "poll" in request else 0)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    # an end in good order takes two seconds
    os._exit(0)


if __name__ == "__main__":
    _serve()
