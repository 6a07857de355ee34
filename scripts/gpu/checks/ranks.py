"""Case 9: DDP and FSDP2 over NCCL, with one rank, and with two where there are two cards."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu.families import gap, methods
from gpu.record import OF_RUNS, Case

_LOSS = 2e-2
_SCRIPTS = Path(__file__).resolve().parents[2]


def run(record) -> None:
    import torch

    cards = 2 if record.toy else torch.cuda.device_count()
    launches = [("one process", "one", 0)]
    for engine in ("ddp", "fsdp2"):
        launches += [
            (f"{engine}, {world} rank{'s' * (world > 1)}", engine, world) for world in (1, 2) if world <= cards
        ]
    if cards < 2:
        record.leave_out("two ranks", "one card is visible")
    if record.toy:
        # two ranks say what one says
        record.leave_out("the other cases", "toy sizes")
        launches = [launch for launch in launches if launch[2] != 1]
        record.leave_out("NCCL", "no CUDA device at toy sizes: the ranks talk over gloo")
        if importlib.util.find_spec("tests.distributed.sharding") is None:
            record.leave_out("fsdp2", "accelerate spreads weights over accelerators alone")
            launches = [launch for launch in launches if launch[1] != "fsdp2"]
    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as ends:
        # all at once: most of their time goes into imports
        running = {name: _Launch(record, engine, world, Path(out), ends) for name, engine, world in launches}
        found = {name: launch.wait(record.left - 3) for name, launch in running.items()}
    alone = {entry["case"]: entry for entry in found.pop("one process")[0]}
    record.equal("one process: cases that were run", len(alone), len(running["one process"].cases))
    for name, ranks in found.items():
        _compare(record, name, running[name], ranks, alone)
    for name, launch in running.items():
        if launch.trouble:
            record.failed(f"{name}: end", launch.trouble, "each rank ends well")


def _compare(record, name: str, launch, ranks, alone) -> None:
    for entries in zip(*ranks, strict=False):
        first, key = entries[0], entries[0]["case"]
        arm, world = f"{name}, {key}", launch.world
        record.equal(f"{arm}: dtype of the log-probabilities", first["dtypes"], ["float32"])
        record.equal(f"{arm}: weights are digested", all(entry["digest"] for entry in entries), True)
        record.equal(f"{arm}: ranks gathered", first["ranks"], [*range(world)])
        rows = [float(rank) for rank in range(world) for _ in range(rank + 1)]
        record.equal(f"{arm}: rows gathered", [entry["rows"] for entry in entries], [rows] * world)
        if key in alone:
            departure = gap(first["losses"], alone[key]["losses"])
            record.at_most(f"{arm}: losses beside one process", departure, _LOSS)
    found = [len(entries) for entries in ranks]
    record.equal(f"{name}: cases that ended, by rank", found, [len(launch.cases)] * launch.world)
    if ranks and ranks[0]:
        record.figure(name, {"wrapper": ranks[0][0]["wrapper"], "backend": ranks[0][0].get("backend")})


class _Launch:
    """The ranks of an engine, started at once."""

    def __init__(self, record, engine: str, world: int, out: Path, ends: contextlib.ExitStack):
        self.world, self.trouble, self.engine, self.out = world, None, engine, out
        self.cases = _cases(engine)[: record.pick(None, 2)]
        given = json.dumps({"toy": record.toy, "cases": self.cases})
        environment = os.environ | {"PYTHONPATH": f"{_SCRIPTS}:{_SCRIPTS.parent}:{os.environ.get('PYTHONPATH', '')}"}
        if world:
            environment |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        if engine == "fsdp2":
            environment |= _of_fsdp()
        elif record.toy:
            environment["ACCELERATE_USE_CPU"] = "true"
        self.processes, self.logs = [], []
        for rank in range(max(world, 1)):
            own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world else {})
            if world < 2 and not record.toy:
                # with several, one process would take them all
                own["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            log = out / f"{engine}-{world}-{rank}.log"
            command = [sys.executable, "-m", "gpu.rank", str(out), engine, given]
            with log.open("wb") as file:
                process = subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT)
            ends.callback(process.wait)
            ends.callback(process.kill)
            self.processes.append(process)
            self.logs.append(log)

    def wait(self, seconds: float) -> list[list[dict]]:
        """Return what each rank has written; ends them all once one has failed or the time is over."""
        until = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes):
            failed = [rank for rank, process in enumerate(self.processes) if process.poll()]
            if failed or time.monotonic() > until:
                first = failed[0] if failed else 0
                how = f"rank {first} {self._end_of(first)}" if failed else f"no end in {seconds:.0f} s"
                self.trouble = f"{how}: {self._said(first)}"
                for process in self.processes:
                    process.kill()
            time.sleep(0.05)
        failed = [rank for rank, process in enumerate(self.processes) if process.returncode]
        if failed and not self.trouble:
            self.trouble = f"rank {failed[0]} {self._end_of(failed[0])}: {self._said(failed[0])}"
        return [self._found(rank) for rank in range(max(self.world, 1))]

    def _end_of(self, rank: int) -> str:
        code = self.processes[rank].returncode
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _said(self, rank: int) -> str:
        # of a line that is written over, a bar's, what stands in the end
        lines = [line.rpartition("\r")[2].strip() for line in self.logs[rank].read_text(errors="replace").splitlines()]
        return " / ".join([line for line in lines if line and "it/s]" not in line][-6:])[-800:] or "it said nothing"

    def _found(self, rank: int) -> list[dict]:
        path = self.out / f"{self.engine}-{max(self.world, 1)}-{rank}" / "found.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _cases(engine: str) -> list[str]:
    """Return the cases that the library's own tests run on two ranks, those left out that the engine refuses."""
    found = []
    for name, method in methods().items():
        refused = getattr(method, "unspread", ()) if engine == "fsdp2" else ()
        found += [f"{name}/{case}" for case in dict.fromkeys((*method.ddp, *method.sharded)) if case not in refused]
    return found


def _of_fsdp() -> dict[str, str]:
    """Return what `accelerate launch` would set for the shipped launch file."""
    import yaml

    from posttrain.paths import configs_dir

    settings = yaml.safe_load((configs_dir() / "accelerate" / "fsdp2.yaml").read_text())
    found = {
        key.upper(): value if isinstance(value, str) else str(value).lower()
        for key, value in settings["fsdp_config"].items()
    }
    return found | {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": settings["mixed_precision"]}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


CASE = Case(
    number=9,
    name="ranks",
    proves="DDP and FSDP2 over NCCL train to one process's losses, with log-probabilities in fp32",
    seconds=90,
    toy_seconds=240,
    run=run,
    imports=OF_RUNS,
    all_cards=True,
)
