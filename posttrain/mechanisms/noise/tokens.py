"""Noise on tokens: a piece of each answer is replaced by tokens that stand before it (MSN, arXiv 2406.17404).

A model that is trained to go on rightly after such a piece can check several guessed tokens in one forward
(`posttrain.generation.jacobi`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.mechanisms.noise import draws

_NOT_LEARNED = -100
# what a sequence's draws are for
_WHETHER, _START, _SOURCE = 1, 2, 3


class NoisyTokens(NamedTuple):
    """Tokens of which a piece is replaced.

    Attributes:
        input_ids: (B, T).
        is_noise: (B, T), bool: which of them were replaced, also by an equal token.
        learned, sequences: learned tokens, and sequences that have some; counts.
        skipped: such sequences that no piece can be replaced of.
        full: sequences whose learned tokens begin at their first or second token: no prompt is told from the answer.
    """

    input_ids: Tensor
    is_noise: Tensor
    learned: Tensor
    sequences: Tensor
    skipped: Tensor
    full: Tensor


class Starts(NamedTuple):
    """Where a piece may begin.

    Attributes:
        allowed: (B * T,), bool.
        length: (B * T,), tokens of a piece that begins there.
    """

    allowed: Tensor
    length: Tensor


def starts(labels: Tensor, found: draws.Sequences, length: int) -> Starts:
    """Find the tokens at which a piece of `length` tokens may begin, so that the last token of an answer is kept.

    An answer is a run of learned tokens within a sequence; of R tokens it has R - L starts, L being `length` or R - 1
    where that is less.

    Args:
        labels: (B, T), -100 where nothing is learned.
        found: the sequences of the batch.
        length: L, 0 or more.
    """
    # in front of a sequence's first token there is nothing to copy
    learned = (labels.flatten() != _NOT_LEARNED) & found.real & (found.place > 0)
    before = torch.zeros_like(learned)
    before[1:] = learned[:-1] & (found.index[1:] == found.index[:-1])
    begins = learned & ~before
    answer = (begins.long().cumsum(dim=0) - 1).clamp(min=0)
    tokens = torch.zeros_like(answer).index_add_(0, answer, learned.long())[answer]
    count = learned.long().cumsum(dim=0)
    first = torch.zeros_like(answer).scatter_reduce_(0, answer[begins], count[begins], "amin", include_self=False)
    offset = count - first[answer]
    piece = (tokens - 1).clamp(max=length)
    return Starts(learned & (offset < tokens - piece) & (piece > 0), piece)


def noisy(
    input_ids: Tensor,
    labels: Tensor,
    found: draws.Sequences,
    seed: int,
    step: int,
    length: int = 5,
    prob: float = 1.0,
    special: Tensor | None = None,
) -> NoisyTokens:
    """Replace a piece of one answer of each sequence: each token by one drawn uniformly from those before it.

    Tokens that were replaced before are drawn from as well, of the same sequence alone. Of several answers one is
    picked with a chance proportional to its starts. Labels, and so what is learned, stay as they are.

    Args:
        input_ids, labels: (B, T).
        found: the sequences of the batch.
        seed: the run's. step: optimiser steps taken so far.
        length: tokens of a piece. prob: share of the sequences that get one.
        special: ids that are not copied; None for all to be.
    """
    ids = input_ids.flatten().clone()
    is_noise = torch.zeros_like(found.real)
    at, learned = starts(labels, found, length), (labels.flatten() != _NOT_LEARNED) & found.real
    # a sequence's key is that of its first token
    order = found.real.nonzero().squeeze(1)
    heads = order[found.place[order] == 0]
    keys = draws.token_keys(input_ids, found, seed, step)[heads]
    allowed = torch.zeros_like(found.index).index_add_(0, found.index, at.allowed.long())
    sequence = found.index[heads]
    has_learned = torch.zeros_like(allowed).index_add_(0, found.index, learned.long())[sequence] > 0
    counts = allowed[sequence]
    chosen = (counts > 0) & (draws.fraction(keys, _WHETHER) < prob)
    places = at.allowed.nonzero().squeeze(1)
    # starts of the sequences in front of it
    behind = counts.cumsum(dim=0) - counts
    heads, keys, counts, behind = heads[chosen], keys[chosen], counts[chosen], behind[chosen]
    place = places[behind + draws.below(keys, counts, _START)] if len(heads) else heads
    lengths = at.length[place]
    for number in range(length):
        going = number < lengths
        if not going.any():
            break
        target = place[going] + number
        source = _source(ids, heads[going], target, keys[going], number, special, found)
        ids[target] = torch.where(source >= 0, ids[source.clamp(min=0)], ids[target])
        is_noise[target] = source >= 0
    first = _first_learned(learned, found)
    return NoisyTokens(
        ids.view_as(input_ids),
        is_noise.view_as(input_ids),
        learned.sum(),
        has_learned.sum(),
        (has_learned & (allowed[sequence] == 0)).sum(),
        (first[sequence] <= 1).sum(),
    )


def _first_learned(learned: Tensor, found: draws.Sequences) -> Tensor:
    """Return the place of the first learned token of sequence i; beyond any where there is none."""
    places = torch.where(learned, found.place, len(found.place) + 2)
    whole = torch.full_like(found.place, len(found.place) + 2)
    return whole.scatter_reduce_(0, found.index, places, "amin")


def _source(ids, heads, targets, keys, number: int, special: Tensor | None, found) -> Tensor:
    """Return where each target's token is copied from, one before it in its sequence; -1 where there is none.

    Tokens of a sequence lie one behind the other.
    """
    usable = found.real if special is None else found.real & ~torch.isin(ids, special)
    count = usable.long().cumsum(dim=0)
    before = count[heads] - usable[heads].long()
    choices = count[targets] - usable[targets].long() - before
    drawn = draws.below(keys, choices.clamp(min=1), _SOURCE + number)
    where = usable.nonzero().squeeze(1)
    if not len(where):
        return torch.full_like(targets, -1)
    return torch.where(choices > 0, where[(before + drawn).clamp(max=len(where) - 1)], torch.full_like(targets, -1))
