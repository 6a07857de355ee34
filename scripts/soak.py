"""Soaks runs in what happens to them on a cluster: killed, told to end, a full disk, a second run in the same folder.

    python scripts/soak.py --rounds 200 --json soak.json

Each round is a run of the tiny model that is started again with `resume_from_checkpoint: auto` until it ends well.
It must then have trained every step exactly once: its losses and its adapter are those of the run that was left alone,
bit for bit; no process, lock or half-written file may be left. Runs are forked from this process, which has imported
the libraries and runs no model itself. Linux only.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STEPS = 9
EVENTS = ("kill", "term", "usr1", "term twice", "hup", "two runs", "full disk", "minutes")
ADAPTER = "adapter_model.safetensors"
# tries of a round that something happens to; the next one is left alone
DISTURBED = 3
# in a folder that a run has left
TRACES = (".saving", ".posttrain.lock")


def settings(method: str, folder: Path) -> list[str]:
    given = dict(
        model_name_or_path="embedded:tiny", output_dir=folder, max_steps=STEPS, use_peft="true", lora_r=4,
        lora_target_modules="all-linear", per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="steps", save_steps=2, save_total_limit=2, report_to="none", disable_tqdm="true", use_cpu="true",
        resume_from_checkpoint="auto", seed=3,
    )  # fmt: skip
    return [word for name, value in (given | GIVEN[method]).items() for word in (f"--{name}", str(value))]


class Run:
    """A recipe in a process of its own, forked from this one."""

    def __init__(self, method: str, words: list[str], log: Path):
        self.began = time.monotonic()
        self.code = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(file, stream)
            sys.argv = [f"{method}.py", *words]
            from posttrain.recipe import run_main

            code = run_main(RECIPES[method].main)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, seconds: float = 300) -> int:
        end = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"it did not end in {seconds} s")
            time.sleep(0.005)
        return self.code

    def send(self, number: int) -> None:
        if not self.ended():
            os.kill(self.pid, number)


def losses(folder: Path) -> list[tuple]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def processes_of(marker: str) -> list[int]:
    """Processes, this one left out, that were started from a round."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if marker.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(path.parent.name)] if state != "Z" else []
    return found


@contextlib.contextmanager
def small_disk(folder: Path):
    """A file system of its own at `folder`, small enough to be filled, where that is allowed."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "soak", str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(b"0")
    return filler


class Round:
    """One run, and what happens to it."""

    def __init__(self, number: int, seed: int, work: Path, usual: dict[str, float], events: tuple[str, ...]):
        self.draw = random.Random(f"{seed}/{number}")
        methods = list(GIVEN)
        self.method, self.work, self.usual = methods[number % len(methods)], work, usual
        self.folder, self.log, self.events = work / "disk" / "run", work / "log", events
        self.happened: list[str] = []

    def start(self, *more: str) -> Run:
        return Run(self.method, [*settings(self.method, self.folder), *more], self.log)

    def wait_a_while(self, run: Run) -> None:
        end = time.monotonic() + self.draw.uniform(0, 1.1 * self.usual[self.method])
        while time.monotonic() < end and not run.ended():
            time.sleep(0.002)

    def go(self) -> None:
        for attempt in range(DISTURBED + 1):
            event = self.draw.choice(self.events) if attempt < DISTURBED else "left alone"
            code = getattr(self, event.replace(" ", "_"))()
            self.happened.append(f"{event}: {code}")
            if code == 0:
                return
        raise AssertionError("the run that was left alone did not end well")

    def left_alone(self) -> int:
        return self.start().wait()

    def kill(self) -> int:
        run = self.start()
        self.wait_a_while(run)
        run.send(signal.SIGKILL)
        return self.expect(run.wait(), 0, -signal.SIGKILL)

    def term(self) -> int:
        return self.told(signal.SIGTERM)

    def usr1(self) -> int:
        return self.told(signal.SIGUSR1)

    def hup(self) -> int:
        return self.told(signal.SIGHUP)

    def told(self, number: int) -> int:
        run = self.start()
        self.wait_a_while(run)
        run.send(number)
        # negative: before the recipe has said what it does at a signal
        return self.expect(run.wait(), 0, 75, 128 + number, -number)

    def term_twice(self) -> int:
        run = self.start()
        self.wait_a_while(run)
        run.send(signal.SIGTERM)
        time.sleep(self.draw.uniform(0, 2))
        run.send(signal.SIGTERM)
        return self.expect(run.wait(), 0, 75, 143, -signal.SIGTERM)

    def minutes(self) -> int:
        share = self.draw.uniform(0.1, 1.0)
        return self.expect(self.start("--max_minutes", str(share * self.usual[self.method] / 60)).wait(), 0, 75)

    def two_runs(self) -> int:
        first = self.start()
        self.wait_a_while(first)
        second = self.start()
        codes = first.wait(), second.wait()
        # one after the other, both may end well
        assert sorted(codes) in ([0, 0], [0, 2]), f"two runs ended with {codes}"
        if 2 in codes:
            assert "which another run is writing to" in self.log.read_text()
        return 0

    def full_disk(self) -> int:
        run = self.start()
        self.wait_a_while(run)
        filler = fill(self.folder.parent)
        code = run.wait()
        filler.unlink()
        return self.expect(code, 0, 4)

    @staticmethod
    def expect(code: int, *allowed: int) -> int:
        assert code in allowed, f"ended with {code}, not one of {allowed}"
        return code

    def check(self, whole: dict, marker: str) -> None:
        assert losses(self.folder) == whole["losses"], "steps or losses differ from the run that was left alone"
        assert (self.folder / ADAPTER).read_bytes() == whole["adapter"], "the adapter differs"
        there = sorted(path.name for path in self.folder.iterdir())
        assert there == whole["files"], f"files differ: {sorted(set(there) ^ set(whole['files']))}"
        assert not processes_of(marker), "processes are left"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="keep folder and log of a round that fails there")
    parser.add_argument("--json", type=Path, help="write a summary there")
    args = parser.parse_args()
    failures, happened, began, lost = [], Counter(), time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="posttrain-soak-") as base:
        base, marker = Path(base), f"POSTTRAIN_SOAK={os.getpid()}"
        usual, wholes = {}, {}
        (base / "disk").mkdir()
        for number, method in enumerate(GIVEN):
            alone = Round(number, args.seed, base, {}, ())
            assert alone.left_alone() == 0, alone.log.read_text()[-3000:]
            start = time.monotonic()
            shutil.rmtree(alone.folder)
            assert alone.left_alone() == 0
            usual[method] = time.monotonic() - start
            wholes[method] = {
                "losses": losses(alone.folder),
                "adapter": (alone.folder / ADAPTER).read_bytes(),
                "files": sorted(path.name for path in alone.folder.iterdir()),
            }
            assert [step for step, _ in wholes[method]["losses"]] == list(range(1, STEPS + 1))
            shutil.rmtree(alone.folder)
        for number in range(args.first, args.first + args.rounds):
            with small_disk(base / "disk") as is_small:
                events = EVENTS if is_small else tuple(event for event in EVENTS if event != "full disk")
                turn = Round(number, args.seed, base, usual, events)
                turn.log.unlink(missing_ok=True)
                try:
                    turn.go()
                    turn.check(wholes[turn.method], marker)
                except AssertionError as error:
                    failures.append(dict(round=number, method=turn.method, happened=turn.happened, error=str(error)))
                    if args.keep:
                        kept = args.keep / f"round-{number}"
                        shutil.copytree(turn.folder, kept / "run", dirs_exist_ok=True)
                        shutil.copy(turn.log, kept / "log")
                happened.update(turn.happened)
                verdict = "FAILED" if failures and failures[-1]["round"] == number else "ok"
                print(number, turn.method, "; ".join(turn.happened), verdict, flush=True)
                shutil.rmtree(turn.folder, ignore_errors=True)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                lost += 1
    minutes = (time.monotonic() - began) / 60
    summary = dict(rounds=args.rounds, seed=args.seed, steps=STEPS, minutes=round(minutes, 1),
                   happened=dict(sorted(happened.items())), failures=failures, processes_left=lost)  # fmt: skip
    print(json.dumps(summary, indent=1))
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if failures or lost else 0


# by recipe: its module, and its settings
RECIPES, GIVEN = {}, {}


def load_recipes() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from tests.families import METHODS

    for family in METHODS.values():
        GIVEN.update(family.recipes)
    for method in GIVEN:
        spec = importlib.util.spec_from_file_location(f"recipe_{method}", ROOT / "recipes" / f"{method}.py")
        RECIPES[method] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(RECIPES[method])


if __name__ == "__main__":
    if os.environ.get("POSTTRAIN_SOAK") != str(os.getpid()):
        # the environment that a process was started with, which its forks share, tells what is left of a round
        os.environ |= {"POSTTRAIN_SOAK": str(os.getpid()), "POSTTRAIN_LOG": "warning"}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    load_recipes()
    sys.exit(main())
