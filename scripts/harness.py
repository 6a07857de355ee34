"""What the scripts under bench/ and evidence/ share: options, resumable grids, intervals, facts of the machine."""

import argparse
import json
import os
import platform
import sys
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

    from posttrain.reporting import library_versions

    facts = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.accelerator.is_available():
        facts["accelerator"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "yes"
    return {"python": platform.python_version(), "versions": library_versions(), "hardware": facts}


def run_grid(folder: Path, cells: Iterable[dict], run: Callable[[dict], dict], minutes: float | None = None) -> None:
    """Run the cells that have no result yet, each into one JSON file of its own, in the order given.

    Put the seed in the outermost loop, so that a grid cut short is a whole one of fewer seeds. A cell is a dict of
    plain values; its file is named by them. After `minutes` no further cell is started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells, started = list(cells), time.monotonic()
    for number, cell in enumerate(cells, 1):
        path = folder / (_cell_name(cell) + ".json")
        if path.exists():
            continue
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            print(f"time is up; {len(cells) - number + 1} cells are still to run", flush=True)
            return
        begun = time.monotonic()
        result = run(cell)
        text = json.dumps({"cell": cell, "seconds": round(time.monotonic() - begun, 1), "result": result})
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(path)
        print(f"[{number}/{len(cells)}] {path.stem} {time.monotonic() - begun:.0f} s", flush=True)


def read_grid(folder: Path, cells: Iterable[dict]) -> tuple[list[dict], list[dict]]:
    """(the results of the cells that have one, the cells that have none)."""
    done, missing = [], []
    for cell in cells:
        path = folder / (_cell_name(cell) + ".json")
        if path.exists():
            done.append(json.loads(path.read_text()))
        else:
            missing.append(cell)
    return done, missing


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


def alternate(sides: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each side per round; sides take turns within a round, and the first `warmup` rounds do not count."""
    times = {name: [] for name in sides}
    for number in range(rounds + warmup):
        for name, call in sides.items():
            begun = time.perf_counter()
            call()
            if number >= warmup:
                times[name].append(time.perf_counter() - begun)
    return times


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
