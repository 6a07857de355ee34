"""What the scripts under bench/ and evidence/ share: options, resumable grids, turns, intervals, the machine."""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import queue
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def options(description: str) -> argparse.ArgumentParser:
    """The command line every script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes on two cores: fewer seeds and rows")
    parser.add_argument("--seeds", type=int, metavar="N", help="number of seeds")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the real data; without it, generated data")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    return parser


def machine() -> dict:
    """Versions and hardware, to stand beside every figure."""
    import torch

    from posttrain.environment import library_versions

    facts = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.accelerator.is_available():
        facts["accelerator"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "yes"
    return {"python": platform.python_version(), "versions": library_versions(), "hardware": facts}


def command() -> str:
    """Return the command that runs, of an absolute path its last name alone: a result tells nobody's folders."""
    return " ".join(["python", *(re.sub(r"(?<![\w.~-])/(\S*/)?", "", word) for word in sys.argv)])


def run_grid(path: Path, cells: Iterable[dict], run: Callable[[dict], dict], minutes: float | None = None) -> None:
    """Run the cells that have no result yet, in the order given, each result a line more of the JSONL file `path`.

    Put the seed in the outermost loop, so that a grid cut short is a whole one of fewer seeds. A cell is a dict of
    plain values, and known by them. After `minutes` no further cell is started. A line that a kill left half-written is
    run again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    cells, started, known = list(cells), time.monotonic(), _results(path)
    for number, cell in enumerate(cells, 1):
        if _key(cell) in known:
            continue
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            print(f"time is up; {len(cells) - number + 1} cells are still to run", flush=True)
            return
        begun = time.monotonic()
        result = run(cell)
        text = json.dumps({"cell": cell, "seconds": round(time.monotonic() - begun, 1), "result": result})
        whole = not path.exists() or not path.stat().st_size or path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + text + "\n")
        print(f"[{number}/{len(cells)}] {_cell_name(cell)} {time.monotonic() - begun:.0f} s", flush=True)


def read_grid(path: Path, cells: Iterable[dict]) -> tuple[list[dict], list[dict]]:
    """(the results of the cells that have one, the cells that have none)."""
    known, cells = _results(path), list(cells)
    done = [known[_key(cell)] for cell in cells if _key(cell) in known]
    return done, [cell for cell in cells if _key(cell) not in known]


def _key(cell: dict) -> str:
    return json.dumps(cell, sort_keys=True)


def _results(path: Path) -> dict[str, dict]:
    """The results of a grid by their cells; lines that are no JSON were cut off, and count as not there."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            found.setdefault(_key(entry["cell"]), entry)
    return found


def bootstrap(table, draws: int = 4000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): the mean of `table` (seeds, rows) with a 95% interval over seeds and rows alike.

    For a comparison give the difference of two tables on the same seeds and rows: the bootstrap is then paired.
    """
    table = np.atleast_2d(np.asarray(table, dtype=float))
    rng = np.random.default_rng(seed)
    seeds, rows = table.shape
    means = np.empty(draws)
    for i in range(draws):
        # a mean over drawn seeds and rows, by how often each was drawn
        seed_counts = np.bincount(rng.integers(seeds, size=seeds), minlength=seeds)
        row_counts = np.bincount(rng.integers(rows, size=rows), minlength=rows)
        means[i] = seed_counts @ table @ row_counts / (seeds * rows)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(table.mean()), float(low), float(high)


def alternate(sides: dict[str, Callable], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each side's steps, the sides taking turns step by step; the first `warmup` rounds do not count.

    A side is called once, with a function `turn`, in a thread of its own, and calls `turn()` at the end of every step;
    there it waits until the others have made theirs, so that one side alone runs at any time. A step's time is that
    from one `turn()` to the next. The first step also holds what the side does before it: warm up at least once. Who
    goes first changes with every round. After the last round each side runs to its end, untimed.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc hands other threads heaps that fit big tensors badly: let all have the main one
        libc.mallopt(-8, 1)
    back, sides = queue.Queue(), {name: _Side(call) for name, call in sides.items()}
    times = {name: [] for name in sides}
    order = list(sides)
    for name, side in sides.items():
        side.thread = threading.Thread(target=side.run, args=(back,), name=name, daemon=True)
        side.thread.start()
    try:
        for number in range(rounds + warmup):
            for name in order:
                begun = time.perf_counter()
                sides[name].go.release()
                ended = back.get()
                if number >= warmup:
                    times[name].append(time.perf_counter() - begun)
                if ended is not None:
                    raise RuntimeError(f"{name} ended before its last step") if ended is _ENDED else ended
                if hasattr(libc, "malloc_trim"):
                    # what one side freed is of no use to the next, whose tensors have other sizes
                    libc.malloc_trim(0)
            order = order[1:] + order[:1]
        for side in sides.values():
            side.go.release()
            ended = back.get()
            if ended is not _ENDED:
                raise RuntimeError(f"{side.thread.name} has more steps than rounds") if ended is None else ended
    finally:
        for side in sides.values():
            side.stopped = True
            side.go.release()
        for side in sides.values():
            side.thread.join()
    return times


class _Stopped(BaseException):
    """Ends a side that waits for a turn that does not come."""


_ENDED = object()


class _Side:
    """One side's thread. Into `back` goes None at the end of a step, `_ENDED` at the last, or what it raised."""

    def __init__(self, call: Callable):
        self.call, self.go, self.stopped = call, threading.Semaphore(0), False

    def run(self, back: queue.Queue) -> None:
        ended = _ENDED
        self.go.acquire()
        if self.stopped:
            return
        try:
            self.call(lambda: self._turn(back))
        except _Stopped:
            return
        except Exception as error:
            ended = error
        back.put(ended)

    def _turn(self, back: queue.Queue) -> None:
        back.put(None)
        self.go.acquire()
        if self.stopped:
            raise _Stopped


def peak_memory() -> float:
    """The most MiB held so far: of the process on CPU, of tensors on a CUDA device."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        # not ru_maxrss: a child starts with that of the process that started it
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    low, middle, high = np.quantile(list(values), [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path}")


def _cell_name(cell: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in cell.items())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
