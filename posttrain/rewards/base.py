"""What all rewards share: TRL's interface, counters, worker processes, and the check of gold answers."""

import hashlib
import os
from dataclasses import fields, is_dataclass

from posttrain.checks import check_integer, check_number, shorten
from posttrain.errors import DataError
from posttrain.log import get_logger
from posttrain.rewards.golds import is_missing
from posttrain.rewards.pool import WorkerPool

# of a pool, or four for each processor where these are more: each has the verifier's libraries in memory
MOST_WORKERS = 64
COUNTERS = ("scored", "timeouts", "exceptions")


def named_with_settings(name: str, reward) -> str:
    """Return a reward function's name, with a digest of its settings where it is a `Reward` that has some."""

    def told(value) -> str:
        if value is None or isinstance(value, str | int | float | list | tuple | dict):
            return repr(value)
        # not its place in memory, nor its module, which is another where its file is a program
        return getattr(value, "__qualname__", type(value).__qualname__)

    own = fields(reward) if is_dataclass(reward) else ()
    settings = [(field.name, told(getattr(reward, field.name))) for field in own]
    return f"{name} {hashlib.sha256(repr(settings).encode()).hexdigest()[:8]}" if settings else name


class Reward:
    """A reward function in TRL's sense: called with lists, it returns a score or None for each completion.

    `reward(prompts=..., completions=..., completion_ids=..., **columns)`: completions are texts or lists of messages,
    columns the other columns of the data set, one value for each completion. None is unscorable: it is left out of the
    group and of the means.

    Subclasses are dataclasses whose fields are their settings; a pickled or copied reward carries these alone.

    Attributes:
        counters: how many completions were scored, timed out, or met an exception, since construction. A sample whose
            exception was blamed on the answer is scored 0 and counted as both scored and exception.
        last_exception: the message of the last one, or None.
        reads: texts that hold what the reward looks for in a completion. A special token that one of them names is kept
            in the text of completions by this library's trainers.
    """

    __name__ = "reward"

    def __post_init__(self):
        self._counts = dict.fromkeys(COUNTERS, 0)
        self.last_exception: str | None = None
        self._has_worked = False

    def __call__(self, prompts=None, completions=None, completion_ids=None, **columns) -> list[float | None]:
        raise NotImplementedError

    def __reduce__(self):
        return _rebuild, (type(self), {field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    @property
    def only_raised(self) -> bool:
        """Whether there were exceptions, and never a score."""
        return self._counts["exceptions"] > 0 and not self._has_worked

    @property
    def counters(self) -> dict[str, int]:
        return dict(self._counts)

    def start(self) -> None:
        """Start the worker processes, where the reward has any. The first call does so otherwise."""

    def close(self) -> None:
        """End the worker processes, where the reward has any. They also end with this process."""

    def gold_errors(self, values: list) -> list[str | None]:
        """Tell for each gold answer why it cannot be scored against; None if it can. The reward may need no gold."""
        return [None] * len(values)

    def _scored(self, scores: list[float | None]) -> list[float | None]:
        count = sum(score is not None for score in scores)
        self._has_worked = self._has_worked or count > 0
        self._count("scored", count)
        return scores

    def _count(self, counter: str, samples: int = 1) -> None:
        self._counts[counter] += samples

    def _note_exception(self, message: str, samples: int = 1) -> None:
        """Count an exception and show it: the first, the second, the fourth and so on."""
        before = self._counts["exceptions"]
        self._count("exceptions", samples)
        self.last_exception = message
        if (before + samples).bit_length() > before.bit_length():
            get_logger().warning(
                "reward %s: %d exceptions so far; the last: %s", self.__name__, before + samples, message
            )

    def _note_timeout(self, what: str) -> None:
        self._count("timeouts")
        count = self._counts["timeouts"]
        if count & (count - 1) == 0:
            get_logger().warning("reward %s: %d timeouts so far; the last on %s", self.__name__, count, what)


def _rebuild(kind: type, settings: dict) -> Reward:
    return kind(**settings)


class PooledReward(Reward):
    """A reward whose verifier runs in worker processes. Subclasses name the verifier's module.

    Settings that subclasses have: `workers`, processes on each rank; `timeout`, seconds a sample.
    """

    verifier: str

    def __post_init__(self):
        super().__post_init__()
        self.timeout = check_number("timeout", self.timeout, 0, None, above=True)
        most = max(MOST_WORKERS, 4 * (os.cpu_count() or 1))
        self.workers = check_integer("workers", self.workers, 1, most)
        self._pool = WorkerPool(self.verifier, self.workers, self.timeout)

    def start(self) -> None:
        self._pool.start()

    def close(self) -> None:
        self._pool.close()

    def _score_in_pool(self, calls: list[dict | None]) -> list[float | None]:
        """Score each call that is not None; equal ones once. None in, 0.0 out: no answer was given."""
        unique = {}
        for call in calls:
            if call is not None:
                unique.setdefault(tuple(call.items()), call)
        outcomes = dict(zip(unique, self._pool.map("score", list(unique.values())), strict=True))
        return [0.0 if call is None else self._value(outcomes[tuple(call.items())], call) for call in calls]

    def _value(self, outcome, call: dict) -> float | None:
        if outcome.timed_out:
            self._note_timeout(f"the answer {shorten(call['answer'])}")
            return None
        if outcome.error is not None:
            self._note_exception(f"{outcome.error}, on the answer {shorten(call['answer'])}")
            return 0.0 if outcome.answer_at_fault else None
        return float(outcome.value)


def completion_text(completion) -> str:
    """Return the text of a completion: a text, or the content of the last message of a list."""
    if isinstance(completion, str):
        return completion
    content = (completion[-1].get("content") if completion else "") or ""
    if isinstance(content, str):
        return content
    return "".join(block.get("text") or "" for block in content if isinstance(block, dict))


def reasoning_of(completion) -> str:
    """Return the reasoning that a chat template has parsed out of the last message's content.

    Empty where there is none.
    """
    if isinstance(completion, str) or not completion:
        return ""
    found = completion[-1].get("reasoning_content") or completion[-1].get("thinking") or ""
    return found if isinstance(found, str) else ""


def column_of(columns: dict, name: str, reward: Reward, setting: str) -> list:
    """Return the values of the column that a reward reads. Raises DataError where it is missing."""
    if columns.get(name) is None:
        found = sorted(key for key in columns if key not in ("trainer_state", "log_extra", "log_metric"))
        raise DataError(
            f"reward {reward.__name__}: the data set has no column {name!r} (found {found}); rename a column, or set "
            f"`{setting}` of the reward to the column's name."
        )
    return columns[name]


def check_golds(dataset, column: str, reward: Reward, name: str = "train_dataset") -> int:
    """Make sure, before training, that every gold answer can be scored against.

    Args:
        dataset: a `datasets.Dataset` or a list of rows.
        column: the one with the gold answers.
        reward: whose verifier reads them; its workers are started if need be.
        name: of the data set, for messages.

    Returns the number of different gold answers. Raises DataError naming the first row and value that cannot be
    read, and how many others there are. A stream cannot be looked at before it comes up, and is a DataError too.
    """
    if not hasattr(dataset, "__len__"):
        raise DataError(f"{name} is a stream, whose gold answers cannot be checked before training; load it whole.")
    names = getattr(dataset, "column_names", None) or list(dict.fromkeys(key for row in dataset for key in row))
    if column not in names:
        raise DataError(f"{name}: column {column!r} with the gold answers is missing; found {sorted(names)}.")
    values = list(dataset[column]) if hasattr(dataset, "column_names") else [row.get(column) for row in dataset]
    # a list or a dictionary cannot be a key, its representation can
    unique = {repr(value): value for value in values}
    errors = dict(zip(unique, reward.gold_errors(list(unique.values())), strict=True))
    bad = [number for number, value in enumerate(values, 1) if errors[repr(value)] is not None]
    if bad:
        value = values[bad[0] - 1]
        more = f" So are {len(bad) - 1} other rows of {len(values)}: {_some(bad[1:])}." if bad[1:] else ""
        raise DataError(
            f"{name}, row {bad[0]}: the gold answer {shorten(value)} in column {column!r} cannot be used by "
            f"{reward.__name__}: {errors[repr(value)]}{more} Mend these rows or leave them out."
        )
    return len(unique)


def check_missing_golds(rewards, dataset, name: str) -> None:
    """Look for rows of tasks whose gold answer is missing, by the rewards of this library that read one.

    A row with null may be meant for the other rewards, which is said; NaN, which pandas writes, stands for no answer.

    Args:
        rewards: all reward functions of a trainer. dataset: a `datasets.Dataset`; others are not looked at.

    Raises DataError for NaN, and for a row that no reward can score, with its number.
    """
    columns = getattr(dataset, "column_names", None) or ()
    if not hasattr(dataset, "__len__"):
        return
    read = [(reward, reward.gold) for reward in rewards or () if isinstance(reward, Reward) and hasattr(reward, "gold")]
    golds = {column: dataset.with_format(None)[column][:] for _, column in read if column in columns}
    for column, values in golds.items():
        for row, value in enumerate(values, 1):
            if value is not None and not isinstance(value, str) and is_missing(value):
                raise DataError(
                    f"{name}, row {row}: the gold answer in column {column!r} is NaN, a missing value. Fill it in, "
                    "write null for none, or leave the row out."
                )
    lacking = {column: [is_missing(value) for value in values] for column, values in golds.items()}
    only_ours = len(read) == len(rewards or ()) and all(column in lacking for _, column in read)
    rows = zip(*lacking.values(), strict=True) if only_ours else ()
    unscored = next((row for row, missing in enumerate(rows, 1) if all(missing)), None)
    if unscored is not None:
        raise DataError(
            f"{name}, row {unscored}: the gold answer in column {' and '.join(map(repr, lacking))} is missing, so no "
            "reward can score an answer. Fill it in, or leave the row out."
        )
    for column, missing in lacking.items():
        if any(missing):
            get_logger().warning(
                "%s: %d of %d rows have no gold answer in column %r (first: row %d); only other rewards score them.",
                name, sum(missing), len(missing), column, missing.index(True) + 1,
            )  # fmt: skip


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
