"""What a case is, and what it leaves: figures, checks against what was wanted, what was left out and why.

A record is a file that is written anew with each entry, so that a process which hangs or crashes leaves what it had.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# what a case on models, or on runs, stands on: imported before its time runs. Of packages alone little is imported.
LIBRARIES = ("torch", "transformers.modeling_utils", "trl.trainer.utils", "posttrain.mechanisms.prefix_sharing")
OF_RUNS = ("torch", "tests.families")
# of a check that goes by the clock, at toy sizes
NO_CLOCK = "toy sizes say nothing of speed"


@dataclass(frozen=True)
class Case:
    """A case of the check.

    Attributes:
        number: its place in the order. name: what `--case` calls it.
        proves: what a pass says, in a sentence without a full stop.
        seconds: its deadline on a card. toy_seconds: the one at toy sizes on a CPU.
        run: takes the `Record` and fills it.
        imports: modules to import before its time runs.
        all_cards: whether it sees all cards; else one, as a run of one process takes.
    """

    number: int
    name: str
    proves: str
    seconds: float
    toy_seconds: float
    run: Callable[["Record"], None]
    imports: tuple[str, ...] = LIBRARIES
    all_cards: bool = False


class Record:
    """Holds what a case has found so far, in the file at `path`.

    Attributes:
        toy: whether the sizes are small and the device is the CPU.
        content: what the file holds.
    """

    def __init__(self, path: Path, toy: bool, seconds: float, machine: dict):
        self.path, self.toy = path, toy
        self._begun, self._seconds = time.monotonic(), seconds
        self.content = {"state": "running", "checks": [], "figures": {}, "left_out": {}, "machine": machine}
        self._write()

    @property
    def device(self):
        """Return the torch device that the case runs on."""
        import torch

        return torch.device("cpu" if self.toy else "cuda")

    @property
    def left(self) -> float:
        """Return the seconds to the deadline."""
        return self._seconds - (time.monotonic() - self._begun)

    def pick(self, full, toy):
        """Return the size for a card, or the one for a toy."""
        return toy if self.toy else full

    def figure(self, name: str, value) -> None:
        """Keep a measured value, or a dict of them."""
        self.content["figures"][name] = value
        self._write()

    def leave_out(self, what: str, why: object) -> None:
        """Note what could not be run here, and the reason."""
        self.content["left_out"][what] = " ".join(str(why).split())[:300]
        self._write()

    def at_most(self, what: str, measured: float, limit: float, clock: bool = False) -> None:
        """Check that a number is `limit` or less; one that is no number is not. `clock`: it is of a clock."""
        self._check(what, measured, f"<= {limit:g}", measured <= limit, clock)

    def at_least(self, what: str, measured: float, limit: float, clock: bool = False) -> None:
        """Check that a number is `limit` or more; one that is no number is not."""
        self._check(what, measured, f">= {limit:g}", measured >= limit, clock)

    def equal(self, what: str, measured, wanted) -> None:
        """Check that a value is the one wanted."""
        self._check(what, measured, str(wanted), measured == wanted)

    def failed(self, what: str, measured: str, wanted: str) -> None:
        """Note a check that was not met."""
        self._check(what, measured, wanted, False)

    def end(self, state: str, error: str | None = None) -> None:
        """Note how the case ended: passed, failed, skipped or error."""
        self.content["state"] = state
        if error:
            self.content["error"] = error
        self._write()

    def _check(self, what, measured, wanted: str, met, clock: bool = False) -> None:
        if clock and self.toy:
            self.figure(what, measured)
            self.leave_out(what, NO_CLOCK)
            return
        entry = {"what": what, "measured": measured, "wanted": wanted, "met": bool(met)}
        self.content["checks"].append(entry)
        self._write()

    def _write(self) -> None:
        write_whole(self.path, self.content)


class Skipped(Exception):
    """Raised by a case that cannot run here at all; its text is the reason."""


def write_whole(path: Path, content: dict) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(_plain(content), indent=1) + "\n")
    os.replace(beside, path)


def _plain(value):
    """Return a value as JSON has it: six digits of a number, text for one that is none."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, int | str | bool | None) else str(value)
