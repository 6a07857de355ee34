"""The ledger of a private run: the steps behind its weights, and every step it took, those thrown away among them."""

import contextlib
import json
import math
import os
import uuid
from pathlib import Path

from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.log import get_logger
from posttrain.privacy.accounting import Steps, epsilon, kinds_of
from posttrain.privacy.ahead import Ahead
from posttrain.whole_files import sync

FILE = "privacy_ledger.jsonl"


class Ledger:
    """Counts a run's steps, so that it can tell what they spent and refuse to spend more than was promised.

    Two counts are kept. The lineage is the steps that the weights come from; it is in each checkpoint. The file
    `privacy_ledger.jsonl` beside the run has every step: one that was taken after the last checkpoint of a killed run
    was seen by whoever saw that run, and a run that goes on from the checkpoint takes it again with new noise, so it
    is spent twice. A step is written there, and is on the disk, before its noise is drawn; nothing is ever removed.

    Args:
        kind: what a step of this run is; its number of steps is not read.
        target_epsilon: what the run may spend; None where only the noise was given.
        delta, accountant, neighbours: as for `posttrain.privacy.accounting.epsilon`.
        data: digest of the training rows; steps on other rows, of earlier runs in the same folder, are not counted.
        writes: whether this process writes the file; the main one does.
    """

    # of the sessions known, those a start tells anew: a checkpoint may know more, and of a torn line the last one does
    _told_anew = slice(None)

    def __init__(
        self,
        kind: Steps,
        *,
        target_epsilon: float | None = None,
        delta: float = 1e-5,
        accountant: str = "pld",
        neighbours: str = "add_remove",
        data: str | None = None,
        writes: bool = True,
    ):
        self.kind = kind._replace(steps=0)
        self.target_epsilon = None if target_epsilon is None or math.isinf(target_epsilon) else target_epsilon
        self._promise = dict(delta=delta, accountant=accountant, neighbours=neighbours)
        self._ahead = Ahead(lambda history: epsilon(history, **self._promise))
        self.delta, self._data, self._writes = delta, data, writes
        self.planned: int | None = None
        # the steps behind the weights, in their order
        self.lineage: list[Steps] = []
        # by a name of its own, each start of a run: what its steps were, and how many it took
        self._sessions: dict[str, dict] = {}
        self._own: str | None = None
        self._path: Path | None = None
        self._is_resumed = False

    def state(self) -> dict:
        """Return lineage and sessions as plain JSON, for a checkpoint."""
        return {
            "lineage": [list(entry) for entry in self.lineage],
            "planned": self.planned,
            "sessions": {name: dict(session) for name, session in self._sessions.items()},
        }

    def load(self, state: dict) -> None:
        """Take over what `state` returned when a checkpoint was written.

        Raises:
            ConfigError: it is not of the form that a ledger writes, or it is missing, so that nothing says what the
                checkpoint's weights have spent.
        """
        try:
            lineage = [steps_of(entry) for entry in state["lineage"]]
            sessions = {str(name): _session(content) for name, content in state["sessions"].items()}
            planned = state["planned"]
            if planned is not None and (type(planned) is not int or planned < 1):
                raise ValueError(planned)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError(
                "the checkpoint does not say which private steps its weights come from, so what they have spent is not "
                "known. Resume from a checkpoint of a private run, or start a new run."
            ) from None
        self.lineage, self._sessions, self.planned, self._is_resumed = lineage, sessions, planned, True

    def begin(self, folder: Path | None, planned: int, checkpoint: Path | None = None, strict: bool = True) -> None:
        """Open the file beside a run that is about to train, and refuse steps that the promise does not cover.

        Args:
            folder: of the run; None for a run without one, whose ledger is in memory.
            planned: steps that the weights will come from in the end, those of the checkpoint among them.
            checkpoint: that the run goes on from, after `load`.
            strict: refuse a checkpoint whose run's file is missing; false counts from the checkpoint alone.

        Raises:
            ConfigError: more epsilon than the target; a file that is missing or damaged.
            EnvironmentIssue: the file cannot be read or written.
        """
        if checkpoint is None:
            self.lineage, self._sessions = [], {}
        taken = sum(entry.steps for entry in self.lineage)
        if self._writes and folder is not None:
            folder = Path(folder)
            self._path = folder / FILE
            self._read(self._path)
            if checkpoint is not None:
                before = Path(checkpoint).resolve().parent / FILE
                if not before.exists():
                    self._is_missing(before, strict)
                elif before != self._path.resolve():
                    self._read(before)
        self._check_planned(planned)
        self.planned = planned if self.planned is None or checkpoint is None else max(planned, self.planned)
        self._own = uuid.uuid4().hex
        head = {**self.kind._asdict(), "steps": 0, "data": self._data, "from_step": taken, "planned": planned}
        self._sessions[self._own] = _session(head)
        if self._path is not None:
            others = list(self._sessions.items())[:-1][self._told_anew]
            self._append([*({"session": name, **content} for name, content in others), {"session": self._own, **head}])
        if thrown := self.thrown_away():
            get_logger().warning(
                "%d private steps on these rows were taken before and thrown away; they stay spent, so the epsilon "
                "spent is above that of the weights",
                thrown,
            )

    def take(self) -> None:
        """Count a step; call it before the step's noise is drawn.

        Raises:
            EnvironmentIssue: the step cannot be written down, so it must not be taken.
        """
        session = self._sessions[self._own]
        session["steps"] += 1
        last = self.lineage[-1] if self.lineage else None
        if last is not None and last._replace(steps=0) == self.kind:
            self.lineage[-1] = last._replace(steps=last.steps + 1)
        else:
            self.lineage.append(self.kind._replace(steps=1))
        if self._path is not None:
            self._append([{"step": session["from_step"] + session["steps"]}])

    def thrown_away(self) -> int:
        """Return the number of steps on the same rows that were taken and are not behind the weights."""
        return sum(entry.steps for entry in self._history()) - sum(entry.steps for entry in self.lineage)

    def of_weights(self) -> float:
        """Return the epsilon of the steps that the weights come from."""
        return epsilon(self.lineage, **self._promise)

    def spent(self) -> float:
        """Return the epsilon of all steps on these rows that the ledger knows."""
        return self._ahead.get(self._history_then())

    def foresee(self, steps: int) -> None:
        """Begin to compute, in a thread, what `spent` is to return after so many steps more; `settle` ends it."""
        self._ahead.begin(self._history_then(steps))

    def settle(self) -> None:
        """Return once no thread computes."""
        self._ahead.wait()

    def _history_then(self, steps: int = 0) -> tuple[Steps, ...]:
        """Return what is spent after so many steps more, entries of one kind as one, in an order of their own."""
        return kinds_of([*self._history(), self.kind._replace(steps=steps)])

    def _history(self) -> list[Steps]:
        taken = [steps_of(session) for session in self._sessions.values() if session["data"] == self._data]
        known = sum(entry.steps for entry in taken)
        # a lineage that goes back beyond every file
        return taken if known >= sum(entry.steps for entry in self.lineage) else list(self.lineage)

    def _check_planned(self, planned: int) -> None:
        if self.target_epsilon is None:
            return
        taken = sum(entry.steps for entry in self.lineage)
        spends = epsilon([*self.lineage, self.kind._replace(steps=max(0, planned - taken))], **self._promise)
        # as a solved noise is only told to so many digits
        if spends <= self.target_epsilon * (1 + 1e-9):
            return
        if not taken:
            raise ConfigError(
                f"the run would take {planned} steps, which spend epsilon {spends:.6g} at delta {self.delta:g}, more "
                f"than target_epsilon, {self.target_epsilon:g}: its noise was solved for fewer. Make the trainer anew "
                "with that number of steps."
            )
        solved = f", whose noise was solved for {self.planned}" if self.planned is not None else ""
        raise ConfigError(
            f"the run would go on to {planned} steps from a checkpoint of {taken}{solved}: together they spend epsilon "
            f"{spends:.6g} at delta {self.delta:g}, more than target_epsilon, {self.target_epsilon:g}. Ask for no more "
            "steps than the checkpoint's run did, or start a new run, which has noise for as many as it takes."
        )

    def _is_missing(self, path: Path, strict: bool) -> None:
        if strict:
            raise ConfigError(
                f"{path} is missing: steps that were taken after the checkpoint and thrown away are spent as well, and "
                "nothing else says how many there were. Put it back beside the checkpoint. To count from the "
                "checkpoint alone, where no such steps were taken, set `check_resume: false`."
            )
        get_logger().warning(
            "%s is missing: epsilon is counted from the checkpoint alone, without steps that were thrown away", path
        )

    def _read(self, path: Path) -> None:
        """Add what a file knows; of a session in several places the longest account counts."""
        if not path.exists():
            return
        try:
            content = path.read_bytes()
        except OSError as error:
            raise EnvironmentIssue(f"the ledger {path} cannot be read: {error.strerror or error}.") from None
        whole, _, torn = content.rpartition(b"\n")
        current, found = None, {}
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            if not line:
                continue
            try:
                entry = json.loads(line)
                if "session" in entry:
                    current = str(entry["session"])
                    known = found.get(current)
                    made = _session(entry)
                    found[current] = made if known is None or made["steps"] > known["steps"] else known
                else:
                    if type(entry["step"]) is not int:
                        raise ValueError(entry)
                    found[current]["steps"] += 1
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ConfigError(
                    f"{path}:{number}: the ledger is damaged there, so nothing says what the run has spent. Restore "
                    "the file from a copy, or start a new run in another output_dir."
                ) from None
        if torn and current is not None:
            # a step that was being written down when the machine stopped counts as taken
            found[current]["steps"] += 1
        for name, session in found.items():
            known = self._sessions.get(name)
            if known is None or session["steps"] > known["steps"]:
                self._sessions[name] = session

    def _append(self, entries: list[dict]) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        try:
            is_new = not self._path.exists()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                _cut_torn_line(descriptor)
                data = text.encode()
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if is_new:
                with contextlib.suppress(OSError):
                    sync(self._path.parent)
        except OSError as error:
            raise EnvironmentIssue(
                f"the ledger {self._path} cannot be written to: {error.strerror or error}. No private step is taken "
                "that is not written down."
            ) from error


def _cut_torn_line(descriptor: int) -> None:
    """Cut the beginning of a line that a killed process left at a file's end; what it meant is told anew behind it."""
    size = end = os.fstat(descriptor).st_size
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        os.ftruncate(descriptor, end)


def steps_of(entry) -> Steps:
    """Return steps that were written as JSON, as a list or a mapping; ValueError, KeyError or TypeError for others."""
    made = Steps(**{name: entry[name] for name in Steps._fields}) if isinstance(entry, dict) else Steps(*entry)
    numbers = (made.noise_multiplier, made.rate)
    if not all(type(value) in (int, float) and math.isfinite(value) and value >= 0 for value in numbers):
        raise ValueError(entry)
    if made.rate > 1 or not all(type(value) is int and value >= 0 for value in (made.units, made.steps)):
        raise ValueError(entry)
    if made.cap is not None and (type(made.cap) is not int or made.cap < 1):
        raise ValueError(entry)
    return made


def _session(content: dict) -> dict:
    """Return a session of a file or a checkpoint after a check of its form; raises as `steps_of` does."""
    made = steps_of(content)._asdict() | {name: content.get(name) for name in ("data", "from_step", "planned")}
    if type(made["from_step"]) is not int or made["from_step"] < 0:
        raise ValueError(content)
    if not (made["data"] is None or isinstance(made["data"], str)):
        raise ValueError(content)
    return made
