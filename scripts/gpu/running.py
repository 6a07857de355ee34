"""Runs cases one after another, each in a process of its own with a deadline; keeps what they leave in one JSON."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpu.record import Case, write_whole

# for the imports of a case, which its own deadline does not count
IMPORTS = 150.0
# with less than this left, no further case begins
_LEAST = 5.0
DONE = ("passed", "skipped")
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "POSTTRAIN_LOG": "warning",
}


class Worker:
    """The process of a case. It imports at once, and runs when told to."""

    def __init__(self, case: Case, package: str, toy: bool, folder: Path):
        self.case, self.path, self.log = case, folder / f"{case.name}.json", folder / f"{case.name}.log"
        entry = Path(__file__).resolve().parents[1] / "gpu_check.py"
        words = [sys.executable, str(entry), "--worker", case.name, str(self.path), "--cases", package]
        environment = _OFFLINE | os.environ | {"POSTTRAIN_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
        if toy:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        elif not case.all_cards:
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                words + ["--toy"] * toy,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # whatever it starts ends with it
                start_new_session=True,
            )

    def run(self, seconds: float, left: float) -> dict:
        """Let the case run; return its record with `state`, `seconds` and, of a failure, why.

        Args:
            seconds: its deadline, imports not counted. left: the time for both.
        """
        seconds = min(seconds, left)
        begun = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{seconds}\n".encode())
            self.process.stdin.close()
        started = None
        while self.process.poll() is None:
            now = time.monotonic()
            if started is None and self.path.exists():
                started = now
            over = now - begun > IMPORTS if started is None else now - started > seconds
            if over or now - begun > left:
                self.end()
                what = "" if started else "its imports were "
                return self._record("deadline", started, f"{what}ended after {now - (started or begun):.0f} s")
            time.sleep(0.02)
        self.end()
        record = self._record(None, started, None)
        if self.process.returncode or record["state"] == "running":
            code = self.process.returncode
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            return record | {"state": "crashed", "error": f"the process ended {how}: {self._said()}"}
        return record

    def end(self) -> None:
        """Kill the process, and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _record(self, state: str | None, started: float | None, error: str | None) -> dict:
        empty = {"state": "running", "checks": [], "figures": {}, "left_out": {}, "machine": {}}
        record = json.loads(self.path.read_text()) if self.path.exists() else empty
        record["seconds"] = round(time.monotonic() - started, 1) if started is not None else 0.0
        if state:
            record |= {"state": state, "error": error}
        return record

    def _said(self) -> str:
        lines = self.log.read_bytes()[-3000:].decode(errors="replace").splitlines()
        return " / ".join(line.strip() for line in lines[-6:] if line.strip())[-800:] or "it said nothing"


def read(path: Path, toy: bool, commit: str | None) -> dict:
    """Return what an earlier run left in `path`, to go on from; an empty result where there is none.

    Raises:
        SystemExit: it is no such file, or of other sizes or another commit.
    """
    if not path.exists():
        return {"toy": toy, "commit": commit, "machine": {}, "cases": {}}
    try:
        found = json.loads(path.read_text())
        there = {name: found[name] for name in ("toy", "commit", "machine", "cases")}
        kept = {name: case["state"] for name, case in there["cases"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"{path} is no result of gpu_check; give another --json") from None
    for name, now in (("toy", toy), ("commit", commit)):
        if kept and there[name] != now:
            raise SystemExit(f"{path} is of another run ({name}: {there[name]}, now {now}); give another --json")
    return there | {"toy": toy, "commit": commit}


def run(chosen: Sequence[Case], package: str, result: dict, path: Path, minutes: float, say=print) -> None:
    """Run cases in their order; each one's outcome goes into `result`, and that into the file `path`.

    No case runs longer than `minutes` after this call; what then has no result is left for the next run.

    Raises:
        SystemExit: the cases that are there already were run on another machine.
    """
    toy, until = result["toy"], time.monotonic() + 60 * minutes
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        _ends_by_signal(),
        tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as ends,
    ):
        workers = []
        # the next one imports while this one runs
        for case in chosen[:1]:
            workers.append(_begin(case, package, toy, folder, ends))
        for place, case in enumerate(chosen):
            left = until - time.monotonic()
            if left < _LEAST:
                say(f"the {minutes:g} minutes are over; run the same command again for the rest")
                return
            workers += [_begin(following, package, toy, folder, ends) for following in chosen[place + 1 : place + 2]]
            say(f"{case.number:2d} {case.name} ...", end=" ", flush=True)
            record = workers[place].run(case.toy_seconds if toy else case.seconds, left)
            _same_machine(result, record.pop("machine"), path)
            result["cases"][case.name] = record
            write_whole(path, result)
            say(f"{record['state']}, {record['seconds']:.0f} s", flush=True)


@contextlib.contextmanager
def _ends_by_signal():
    """Have SIGTERM and SIGHUP end the workers as well, whose sessions are their own, and remove their folder."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _begin(case: Case, package: str, toy: bool, folder: str, ends: contextlib.ExitStack) -> Worker:
    worker = Worker(case, package, toy, Path(folder))
    ends.callback(worker.end)
    return worker


def _same_machine(result: dict, machine: dict, path: Path) -> None:
    """Keep the first case's machine; raise where a later one's has another card or other libraries."""
    there = result["machine"]
    if not there or not result["cases"]:
        result["machine"] = machine
        return
    for name, of in (("card", lambda m: m["hardware"].get("accelerator")), ("versions", lambda m: m["versions"])):
        if machine and of(there) != of(machine):
            raise SystemExit(f"{path} has cases of another machine ({name}: {of(there)}, here {of(machine)})")
