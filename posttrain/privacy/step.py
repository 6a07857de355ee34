"""The private step: gradients of rows become one noisy gradient, in which a unit of privacy moves little."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from posttrain.errors import PosttrainError
from posttrain.mechanisms.row_gradients import wide_enough
from posttrain.privacy import clipping
from posttrain.privacy.noise import gaussian


@dataclass(frozen=True)
class RowUnits:
    """To which units of privacy the rows of a micro-batch belong; both are of the host.

    Attributes:
        numbers: of the units, in the order in which they first come up; empty where the rows are nobody's.
        index: (rows,) the place of each row's unit among them.
    """

    numbers: list[int]
    index: Tensor

    @classmethod
    def of(cls, units: Sequence[int]) -> "RowUnits":
        """Take the unit of each row."""
        place = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
        return cls(list(place), torch.tensor([place[unit] for unit in units], dtype=torch.long))


class Witness(Protocol):
    """What adds made-up units to a step and sees what the step gives away, as an audit's canaries do."""

    def add_to(self, total: Tensor) -> None:
        """Add to the sum of all trained values, (values,), before the noise; called on one rank."""

    def observe(self, noisy: Tensor) -> None:
        """See the sum over all ranks with its noise, (values,), undivided; called on every rank."""


class Statistics(NamedTuple):
    """Numbers of one rank's part of a step; they are computed from private rows without noise, and no one else's.

    Attributes:
        units: that took part. clipped: those of them whose gradient was longer than the clipping norm.
        norms: sum over them of the norms before clipping.
        bad_rows: rows whose gradient was not finite; zero stood in their place.

    All but `units` are of the device of the gradients, which is not waited for.
    """

    units: int
    clipped: Tensor
    norms: Tensor
    bad_rows: Tensor


class PrivateStep:
    """Adds up a step's gradients of rows so that one unit of privacy moves the sum by `clip_norm` at most.

    The gradients of a unit's rows are summed before they are clipped. All rows of a unit are on one rank; where
    `spans`, they may be in several micro-batches: the unit of a micro-batch's last row then stays open until another
    unit follows, or the step ends. `finish` adds noise once, on one rank, to the sum before the ranks' are added.

        gradient = (sum over units of c_u g_u + N(0, (sigma C)^2)) / L

    Args:
        parameters: all that is trained, by name.
        clip_norm: C. clipping: flat or automatic. noise_std: sigma C, of one value of the sum.
        expected: L, the units that a step draws on average; not those that it drew.
        adds_noise: whether this is the rank that does.
        all_reduce: adds a tensor over ranks and returns it; None for one process.
        spans: whether the rows of a unit may be in several micro-batches.
        witness: adds its own units to the sum, and sees it with the noise.
        source: of random bytes, for tests.

    Source: arXiv 1607.00133, algorithm 1; 2407.07737 (sums of a unit's gradients).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        clip_norm: float,
        clipping: str = "flat",
        noise_std: float = 0.0,
        expected: int,
        adds_noise: bool = True,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        spans: bool = False,
        witness: Witness | None = None,
        source: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.parameters = dict(parameters)
        self.clip_norm, self.clipping, self.noise_std, self.expected = clip_norm, clipping, noise_std, expected
        self.adds_noise, self.witness = adds_noise, witness
        self._all_reduce, self._spans, self._source = all_reduce, spans, source
        # where the values of each parameter begin in the sum, in which they lie behind each other
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self._starts = dict(zip(self.parameters, itertools.accumulate(sizes[:-1], initial=0), strict=True))
        self._sizes, self._total = sizes, None
        self._dtype = wide_enough(self.parameters.values())
        self.begin()

    def begin(self) -> None:
        """Begin a step; what an unfinished one has added up is dropped."""
        if self._total is not None:
            self._total.zero_()
        # the last unit, of which rows may follow: its number, and its gradients (1, ...) so far
        self._open: tuple[int, dict[str, Tensor]] | None = None
        self._closed: set[int] = set()
        self._units, self._clipped, self._norms, self._bad = 0, 0.0, 0.0, 0

    @torch.no_grad()
    def collect(self, gradients: dict[str, Tensor], units: RowUnits) -> None:
        """Add a micro-batch's gradients of rows, after its backward. Waits for no device.

        Args:
            gradients: (rows, ...) in fp32, or in float64 where a parameter is: the values of a parameter, and of those
                that follow it in the order of all if the tensor has more, by its name; zero for a parameter that is in
                none. They are changed.
            units: of the rows; without any, nothing is added.
        """
        numbers, index = list(units.numbers), units.index
        if not numbers:
            return
        if not gradients:
            name, parameter = next(iter(self.parameters.items()))
            gradients = {name: parameter.new_zeros(len(index), *parameter.shape, dtype=self._dtype)}
        squares, bad = clipping.without_bad_rows(gradients)
        self._bad = self._bad + bad.sum()
        alone = len(numbers) == len(index)
        if alone and not self._spans:
            self._sum(numbers, gradients, squares)
            return
        if not alone:
            place = index.to(bad.device, non_blocking=True)
            # one after the other: the rows of each are freed
            for name in gradients:
                rows = gradients[name]
                gradients[name] = rows.new_zeros(len(numbers), *rows.shape[1:]).index_add_(0, place, rows)
        if self._spans:
            self._join(numbers, gradients)
            last = int(index[-1])
            self._open = numbers.pop(last), {name: rows[last : last + 1].clone() for name, rows in gradients.items()}
            gradients = {name: torch.cat([rows[:last], rows[last + 1 :]]) for name, rows in gradients.items()}
        self._sum(numbers, gradients)

    def _join(self, units: list[int], gradients: dict[str, Tensor]) -> None:
        """Add the open unit's gradients so far to those of the same unit (units, ...) in place, or to the sum."""
        if self._open is None or self._open[0] not in units:
            self._close()
            return
        (unit, before), self._open = self._open, None
        for name, rows in before.items():
            if name not in gradients:
                gradients[name] = rows.new_zeros(len(units), *rows.shape[1:])
            gradients[name][units.index(unit)] += rows[0]

    def _close(self) -> None:
        """Add the open unit to the sum."""
        if self._open is not None:
            (unit, gradients), self._open = self._open, None
            self._sum([unit], gradients)

    def _sum(self, units: list[int], gradients: Mapping[str, Tensor], squares: Tensor | None = None) -> None:
        """Clip the gradients of whole units and add them to the sum; `squares` of their norms, if known."""
        again = self._closed.intersection(units)
        if again:
            # its two parts would be clipped apart, and together they may be twice as long as was promised
            raise PosttrainError(
                f"{len(again)} units of privacy have rows in several micro-batches of a step that do not follow each "
                "other, so that the promise would not hold. The sampler of batches must keep a unit together."
            )
        if not units:
            return
        self._closed.update(units)
        if squares is None:
            # a sum of finite gradients may not be finite
            squares, _ = clipping.without_bad_rows(gradients)
        norms = squares.sqrt()
        weights = clipping.coefficients(norms, self.clip_norm, self.clipping)
        self._make_total(norms.device)
        for name, rows in gradients.items():
            part = self._total.narrow(0, self._starts[name], rows.shape[1:].numel())
            clipping.add_weighted(part, rows, weights)
        self._units += len(units)
        self._clipped = self._clipped + (norms > self.clip_norm).sum()
        self._norms = self._norms + norms.sum()

    def _make_total(self, device: torch.device) -> None:
        if self._total is None or self._total.device != device:
            self._total = torch.zeros(sum(self._sizes), device=device, dtype=self._dtype)

    @torch.no_grad()
    def finish(self) -> Statistics:
        """End the step: add noise, add up the ranks, and write the gradient of each parameter; every rank calls it."""
        self._close()
        self._make_total(next(iter(self.parameters.values())).device)
        total = self._total
        if self.adds_noise:
            if self.witness is not None:
                self.witness.add_to(total)
            if self.noise_std > 0:
                total += gaussian(total.numel(), self.noise_std, self._source).to(total)
        if self._all_reduce is not None:
            total = self._all_reduce(total)
        if self.witness is not None:
            self.witness.observe(total)
        parts = (total / self.expected).split(self._sizes)
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        numbers = (self._clipped, self._norms, self._bad)
        # on the device, whose numbers are asked for later
        found = Statistics(self._units, *(total.new_zeros(()) + number for number in numbers))
        self.begin()
        return found
