"""Rows drawn with replacement by weight: one seeded stream, the same on every rank and after a resumption."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class WeightedSampler(Sampler[int]):
    """Draws rows with probability proportional to their weights.

    Every rank draws the same stream, of which accelerate deals out the batches: which rows an optimiser step sees does
    not depend on how it is split. The stream of an epoch follows from the seed and the epoch's number alone, so a
    resumed run skips what it has seen and goes on with the same rows.

    Args:
        weights: 0 or more each, at least one above 0; a row of weight 0 is never drawn.
        num_samples: rows an epoch.
        seed: of the run.
        epoch: called for the number of the epoch that is about to begin. A callable, because accelerate does not
            forward set_epoch to this sampler.

    Raises:
        ValueError: a weight that is negative or not finite, or none above 0.
    """

    def __init__(self, weights: Sequence[float], num_samples: int, seed: int, epoch: Callable[[], int]) -> None:
        values = torch.as_tensor(weights, dtype=torch.float64)
        if not (torch.isfinite(values).all() and (values >= 0).all() and (values > 0).any()):
            raise ValueError("weights must be finite numbers of 0 or more, at least one of them above 0.")
        self._cumulative = values.cumsum(0)
        self._num_samples, self._seed, self._epoch = num_samples, seed, epoch

    def __len__(self) -> int:
        return self._num_samples

    def __iter__(self) -> Iterator[int]:
        # seeds of different runs and epochs must not meet, as seed + epoch would
        generator = torch.Generator().manual_seed((self._seed << 24) + self._epoch())
        points = torch.rand(self._num_samples, dtype=torch.float64, generator=generator) * self._cumulative[-1]
        # the first row whose sum lies beyond the point: one of weight 0 adds nothing and is passed over
        drawn = torch.searchsorted(self._cumulative, points, right=True)
        yield from drawn.clamp(max=self._last).tolist()

    @property
    def _last(self) -> int:
        # rounding may put a point on the very end
        return int((self._cumulative < self._cumulative[-1]).sum())
