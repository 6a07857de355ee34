"""Gaussian noise of a private step, from the operating system's entropy and from no seed.

Numbers of a generator that a seed begins, such as torch's, can be told from few of them, and whoever has the seed has
the noise. The noise is computed in double precision; that a sum with it is rounded is not hardened against.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# values at a time: they stay in a processor's cache
_CHUNK = 1 << 16
_MASK = (1 << 53) - 1


def gaussian(count: int, std: float, source: Callable[[int], bytes] = os.urandom) -> Tensor:
    """Return independent normal numbers of mean 0, by Box and Muller's transform of 53 random bits each.

    Args:
        count: how many. std: their standard deviation.
        source: gives so many random bytes; for tests.

    Returns:
        (count,) float64 on the CPU. None is further from 0 than 8.6 `std`, where one in 10^17 would be.
    """
    made = torch.empty(count, dtype=torch.float64)
    parts = made.split(_CHUNK) if count else ()

    def fill(part: Tensor) -> None:
        half = (len(part) + 1) // 2
        bits = torch.frombuffer(bytearray(source(16 * half)), dtype=torch.int64).bitwise_and_(_MASK)
        bits = bits.double().mul_(2.0**-53).view(2, half)
        # from above 0 to 1, whose logarithm is finite
        length = bits[0].add_(2.0**-53).log_().mul_(-2 * std * std).sqrt_()
        angle = bits[1].mul_(2 * math.pi)
        torch.mul(angle.cos(), length, out=part[:half])
        rest = len(part) - half
        part[half:] = angle.sin_().mul_(length)[:rest]

    # most of the time goes to the system's random bytes, which threads wait for side by side
    workers = min(torch.get_num_threads(), len(parts))
    if source is os.urandom and workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, parts))
    else:
        for part in parts:
            fill(part)
    return made
