"""Draws of a private run: each unit of privacy on its own, by the system's entropy, dealt to micro-batches."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from posttrain.checks import plain, shorten
from posttrain.errors import ConfigError, DataError

# of the number of units a step draws; a smaller distance of the cap costs epsilon, a larger one micro-batches
_DEVIATIONS = 6.0
_SECRET_BYTES = 32


def cap_of(expected: int, units: int) -> int:
    """Return the most units that a step takes: `expected` and 6 times its root, or all units where they are fewer.

    A draw of more is cut to so many, at random; it happens about once in a thousand million draws, and the accounting
    of capped draws has it. (A cap at `expected` itself would cost several times the epsilon.)
    """
    return min(units, math.ceil(expected + _DEVIATIONS * math.sqrt(expected)))


def micro_batches(cap: int, rows_per_unit: int, micro_batch_size: int, ranks: int) -> int:
    """Return the number of micro-batches of a step on each rank that hold any draw of `cap` units, each unit whole.

    It follows from settings alone, so that it tells nothing about who has how many rows.

    Args:
        cap: most units of a step, over all ranks. rows_per_unit: most rows of a unit.
        micro_batch_size: most rows of a micro-batch. ranks: how many processes share a step.

    Raises:
        ConfigError: a micro-batch does not hold the rows of one unit.
    """
    if rows_per_unit > micro_batch_size:
        raise ConfigError(
            f"rows_per_unit is {rows_per_unit}, and per_device_train_batch_size is {micro_batch_size}: the gradients "
            "of a unit's rows are summed before they are clipped, so a micro-batch has to hold them. Give "
            f"per_device_train_batch_size {rows_per_unit} or more, or a smaller rows_per_unit."
        )
    return math.ceil(math.ceil(cap / ranks) / (micro_batch_size // rows_per_unit))


def rows_by_unit(values: Sequence | None, rows: int, column: str = "privacy_unit_column") -> Sequence[Sequence[int]]:
    """Return the rows of each unit of privacy, in the order in which units first appear.

    Args:
        values: of the unit's column, one a row; None where each row is a unit. rows: how many there are.
        column: its name, for errors.

    Raises:
        DataError: a row without a value, or whose value is neither a text nor a whole number: it would belong to nobody
            or its owner could not be told apart from others.
    """
    if values is None:
        return np.arange(rows)[:, None]
    found: dict[object, list[int]] = {}
    for row, value in enumerate(values):
        value = plain(value)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise DataError(
                f"row {row} has {shorten(value)} in {column}; each row needs a text or a whole number there, which "
                "says to whom it belongs."
            )
        # a text of digits and the number are two people
        found.setdefault((type(value), value), []).append(row)
    return [np.array(own) for own in found.values()]


def shared_secret(ranks: int) -> bytes:
    """Return 32 bytes of the operating system's entropy, the same on all ranks; every rank calls it."""
    secret = [os.urandom(_SECRET_BYTES)]
    if ranks > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(secret)
    return secret[0]


class PoissonUnits:
    """Draws the units of each step and yields this rank's micro-batches of rows, as a DataLoader's batch sampler.

    In each step every unit is drawn with probability `rate`, independently of all others and of all other steps. Draws
    of more than `cap` units are cut to that many at random. Of a unit with more than `rows_per_unit` rows, so many are
    chosen at random, anew for each draw. Units are dealt whole, the largest first, each to the rank with the fewest
    rows and there to the first micro-batch that has room; so later micro-batches may be empty.

    All numbers are SHAKE-256 of a secret from the operating system's entropy: whoever knows the run's seed knows
    nothing about who took part. The secret is the same on all ranks and is never saved: a run that goes on from a
    checkpoint draws anew.

    Args:
        units: the rows of each unit.
        rate: probability of a unit in a step. cap: most units of a step.
        rows_per_unit: most rows of a unit in a step.
        micro_batch_size: most rows of a micro-batch.
        micro_batches: of a step on each rank; `micro_batches` of this module gives the least.
        steps: how many.
        rank, ranks: of this process, and how many there are.
        secret: from `shared_secret`; default: drawn when the iteration begins.
        source: for tests: gives the numbers of a step's units in place of a draw.

    Yields:
        lists of (row, unit), `micro_batches` for each step, the rows of a unit behind each other.
    """

    # what DataLoader and accelerate ask of a batch sampler
    drop_last = False
    batch_size = None

    def __init__(
        self,
        units: Sequence[Sequence[int]],
        *,
        rate: float,
        cap: int,
        rows_per_unit: int,
        micro_batch_size: int,
        micro_batches: int,
        steps: int,
        rank: int = 0,
        ranks: int = 1,
        secret: bytes | None = None,
        source: Callable[[int], Sequence[int]] | None = None,
    ):
        self.units, self.rate, self.cap, self.rows_per_unit = units, rate, cap, rows_per_unit
        self.micro_batch_size, self.micro_batches, self.steps = micro_batch_size, micro_batches, steps
        self.rank, self.ranks, self.source = rank, ranks, source
        self._secret = secret

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self._secret is None:
            self._secret = shared_secret(self.ranks)
        # of each iteration its own draws
        secret, self._secret = self._secret, hashlib.shake_256(b"next" + self._secret).digest(_SECRET_BYTES)
        for step in range(self.steps):
            yield from self._dealt(secret, step)

    def _dealt(self, secret: bytes, step: int) -> list[list[tuple[int, int]]]:
        """Return this rank's micro-batches of a step."""
        chosen = self.source(step) if self.source is not None else self._drawn(secret, step)
        rows = {int(unit): self._rows(secret, step, int(unit)) for unit in chosen}
        share = math.ceil(self.cap / self.ranks)
        held = [0] * self.ranks
        own: list[list[list[int]]] = [[] for _ in range(self.ranks)]
        for unit in sorted(rows, key=lambda unit: (-len(rows[unit]), unit)):
            taker = min(
                (rank for rank in range(self.ranks) if len(own[rank]) < share), key=lambda rank: (held[rank], rank)
            )
            own[taker].append(unit)
            held[taker] += len(rows[unit])
        batches: list[list[tuple[int, int]]] = [[] for _ in range(self.micro_batches)]
        for unit in own[self.rank]:
            room = next(batch for batch in batches if len(batch) + len(rows[unit]) <= self.micro_batch_size)
            room += [(row, unit) for row in rows[unit]]
        return batches

    def _drawn(self, secret: bytes, step: int) -> np.ndarray:
        """Return the units of a step, in their order in the data."""
        numbers = random_numbers(secret, f"units {step}", len(self.units))
        found = np.flatnonzero(drawn(numbers, self.rate))
        if len(found) > self.cap:
            # of numbers below one and the same each order is as likely
            found = np.sort(found[np.argsort(numbers[found], kind="stable")[: self.cap]])
        return found

    def _rows(self, secret: bytes, step: int, unit: int) -> list[int]:
        rows = [int(row) for row in self.units[unit]]
        if len(rows) <= self.rows_per_unit:
            return rows
        order = np.argsort(random_numbers(secret, f"rows {step} {unit}", len(rows)), kind="stable")
        return [rows[place] for place in sorted(order[: self.rows_per_unit])]


def random_numbers(secret: bytes, purpose: str, count: int) -> np.ndarray:
    """Return `count` numbers of 64 bits that nobody without the secret can tell from random ones."""
    stream = hashlib.shake_256(secret + purpose.encode()).digest(8 * count)
    return np.frombuffer(stream, dtype="<u8")


def drawn(numbers: np.ndarray, rate: float) -> np.ndarray:
    """Return which of some random numbers of 64 bits are drawn, each with the probability `rate` to 2 ** -64."""
    threshold = int(rate * 2.0**64)
    return numbers < np.uint64(threshold) if threshold < 2**64 else np.ones(len(numbers), dtype=bool)
