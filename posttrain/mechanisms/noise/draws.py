"""Random numbers that hang on what they are for, not on when they are drawn: tensors of integers in, noise out.

A number is a hash (the finaliser of splitmix64) of the run's seed, the optimiser step, the site in the model, the
tokens of its sequence, its place in the sequence and its coordinate. The same comes out for every split of a batch
over micro-batches and ranks, for rows that are padded, packed or flattened, and whenever it is drawn again.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WIDTH = 23
# coordinates whose integers are held at a time
_BLOCK = 1 << 22


class Sequences(NamedTuple):
    """Which sequence each token of a batch belongs to.

    Attributes:
        index: (B * T,), the number of the token's sequence; of padding that of any sequence.
        place: (B * T,), the token's place in its sequence, from 0.
        real: (B * T,), bool: False for padding.
        lengths: (B * T,), the number of real tokens of sequence i; 0 behind the last sequence.
    """

    index: Tensor
    place: Tensor
    real: Tensor
    lengths: Tensor


def signed(value: int) -> int:
    """Return the 64 lowest bits of a whole number as int64 has them."""
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value


def mix(keys: Tensor) -> Tensor:
    """Return the hash of each int64, as splitmix64 ends: every bit of a key moves every bit with chance one half."""
    keys = (keys ^ ((keys >> 30) & ((1 << 34) - 1))) * signed(_FIRST)
    keys = (keys ^ ((keys >> 27) & ((1 << 37) - 1))) * signed(_SECOND)
    return keys ^ ((keys >> 31) & ((1 << 33) - 1))


def sequences(input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Sequences:
    """Part a batch into its sequences.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T), 0 for padding on either side; None where no token is padding.
        position_ids: (B, T), which begin at 0 with each of several sequences in a row; None where a row is one.

    A sequence of one token predicts nothing. In rows without padding the tokens that fill a row up to a multiple look
    like that, so they count as padding.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    begins = real & (real.long().cumsum(dim=1) == 1)
    if position_ids is not None:
        begins = begins | (real & (position_ids == 0).expand_as(real))
    real, begins = real.flatten(), begins.flatten()
    index = (begins.long().cumsum(dim=0) - 1).clamp(min=0)
    lengths = torch.zeros_like(index).index_add_(0, index, real.long())
    if attention_mask is None:
        real = real & (lengths[index] > 1)
    # places count the real tokens since the sequence began
    count = real.long().cumsum(dim=0)
    before = torch.zeros_like(index).scatter_reduce_(0, index, count - real.long(), "amin", include_self=False)
    place = (count - 1 - before[index]).clamp(min=0)
    lengths = torch.zeros_like(index).index_add_(0, index, real.long())
    return Sequences(index, place, real, lengths)


def run_key(seed: int, step: int, site: int = 0) -> Tensor:
    """Return the key () of a site in the model at an optimiser step of a run."""
    key = torch.zeros((), dtype=torch.long)
    for number in (seed, step, site):
        key = mix((key + signed(number + 1)) * signed(_GOLDEN))
    return key


def token_keys(input_ids: Tensor, found: Sequences, seed: int, step: int, site: int = 0) -> Tensor:
    """Return a key for each token (B * T,): of the seed, step and site, its sequence's tokens, and its place there.

    Sequences of equal tokens have equal keys, wherever they stand.
    """
    places = (found.place + 1) * signed(_GOLDEN)
    # a sum does not depend on the order in which it is taken
    parts = mix(mix(input_ids.flatten().long() + 1) + places) * found.real
    content = torch.zeros_like(parts).index_add_(0, found.index, parts)
    run = run_key(seed, step, site).to(input_ids.device)
    return mix(mix(content ^ run)[found.index] + places)


def fraction(keys: Tensor, number: int) -> Tensor:
    """Return a number from 0 up to 1 in fp64 for each key (N,), another one for each whole `number`."""
    bits = mix(keys + signed((number + 1) * _GOLDEN))
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def below(keys: Tensor, bounds: Tensor, number: int) -> Tensor:
    """Return an integer from 0 up to each bound (N,), which is excluded, all with equal chance but for 1 in 2**53."""
    return (fraction(keys, number) * bounds).long().minimum(bounds - 1)


def uniform(keys: Tensor, size: int, first: int = 0) -> Tensor:
    """Return numbers (N, size) in fp32, uniform on (-1, 1), for keys (N,): 2**23 values, symmetric around 0.

    `first`: the even coordinate that they begin with.
    """
    words = torch.arange(first // 2 + 1, (first + size + 1) // 2 + 1, device=keys.device)
    words = mix(keys[:, None] + words * signed(_GOLDEN))
    lowest = (1 << _WIDTH) - 1
    # each word gives two numbers, of bits that they do not share
    whole = torch.stack([words & lowest, (words >> 32) & lowest], dim=-1).flatten(1)[:, :size]
    return (whole.float() + 0.5) * 2.0 ** (1 - _WIDTH) - 1.0


def signs(keys: Tensor, size: int) -> Tensor:
    """Return numbers (N, size) in fp32, -1 or 1 with equal chance, for keys (N,)."""
    words = torch.arange(1, size // 64 + 2, device=keys.device)
    words = mix(keys[:, None] + words * signed(_GOLDEN))
    bits = (words[..., None] >> torch.arange(64, device=keys.device)) & 1
    return bits.flatten(1)[:, :size].float() * 2.0 - 1.0


def normal(keys: Tensor, size: int) -> Tensor:
    """Return numbers (N, size) in fp32 of the standard normal distribution for keys (N,), within 5.3 of 0."""
    return torch.erfinv(uniform(keys, size)) * math.sqrt(2.0)


class Kind(NamedTuple):
    """A kind of noise: what it is drawn by, and its scale in units of alpha / sqrt(L d)."""

    draw: Callable[[Tensor, int], Tensor]
    scale: float


KINDS = {
    # arXiv 2310.05914, algorithm 1
    "neftune": Kind(uniform, 1.0),
    "uniform": Kind(uniform, math.sqrt(3.0)),
    "gaussian": Kind(normal, 1.0),
    # arXiv 2312.01523
    "symnoise": Kind(signs, 1.0),
}


def noise(kind: str, keys: Tensor, scales: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return noise (N, size) of a kind in `KINDS`, times the scale (N,) of each row."""
    made = torch.empty(len(keys), size, dtype=dtype, device=keys.device)
    rows = max(_BLOCK // max(size, 1), 1)
    for start in range(0, len(keys), rows):
        block = slice(start, start + rows)
        made[block] = KINDS[kind].draw(keys[block], size) * scales[block, None]
    return made


def scales(kind: str, alpha: float, found: Sequences, size: int) -> Tensor:
    """Return the scale of the noise of each token (B * T,), in fp32; 0 for padding.

    With L real tokens in a sequence and d = `size` coordinates, alpha / sqrt(L d) times that of `KINDS`. The root mean
    square norm of a sequence's noise is alpha, but for `neftune`, whose is alpha / sqrt(3).
    """
    length = found.lengths[found.index].clamp(min=1).float()
    scale = KINDS[kind].scale * alpha / torch.sqrt(length * size)
    return torch.where(found.real, scale, scale.new_zeros(()))
