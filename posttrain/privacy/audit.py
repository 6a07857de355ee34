"""An audit of private training in one run: which made-up units took part is guessed from the noisy gradients.

Each of many canaries takes part or not by a coin of its own. A mechanism that keeps (epsilon, delta) lets nobody guess
the coins better than a certain chance, whatever else it does; so many right guesses are a lower bound on epsilon, with
a known probability of being wrong. It proves faults: a bound above the promise means that the promise is broken. It
proves no promise: a bound below it is what a right run gives, and what a weak audit gives as well.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# of all canaries: how many are guessed, from the surest on
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
_LARGEST = 40.0


class Audit(NamedTuple):
    """What an audit found.

    Attributes:
        lower_bound: on the epsilon of what was audited; 0 where the guesses are no better than chance.
        right, guesses: of the number of guesses that gives the bound.
        canaries: how many there were.
        confidence: probability, at least, that the bound holds.
    """

    lower_bound: float
    right: int
    guesses: int
    canaries: int
    confidence: float


def lower_bound(right: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """Return the epsilon below which `right` of `guesses` would be right with a probability of 1 - `confidence`.

    With q = e^epsilon / (1 + e^epsilon) and W binomial of `guesses` trials with probability q, the chance of as many is
    at most P[W >= right] + 2 canaries delta max over i >= 1 of P[right > W >= right - i] / i.

    Args:
        right: guesses that were right. guesses: coins that were guessed. canaries: coins that were thrown.
        delta: of the promise.

    Source: arXiv 2305.08846, theorem 5.2.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"{right} of {guesses} guesses right of {canaries} canaries")
    chance = 1 - confidence
    low, high = 0.0, _LARGEST
    if _chance(low, right, guesses, canaries, delta) > chance:
        return 0.0
    if _chance(high, right, guesses, canaries, delta) <= chance:
        return high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _chance(middle, right, guesses, canaries, delta) <= chance else (low, middle)
    return low


def _chance(epsilon: float, right: int, guesses: int, canaries: int, delta: float) -> float:
    """Return the largest chance that a mechanism of this epsilon and delta gives so many right guesses."""
    counts = np.arange(guesses + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, guesses + 1)))])
    hit, miss = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    logs = factorials[-1] - factorials - factorials[::-1] + counts * hit + (guesses - counts) * miss
    mass = np.exp(logs)
    below = np.cumsum(mass[:right][::-1])
    spread = float(np.max(below / np.arange(1, right + 1))) if right else 0.0
    return min(1.0, float(mass[right:].sum()) + 2 * canaries * delta * spread)


def audit(scores: Sequence[float], included: Sequence[bool], delta: float, confidence: float = 0.95) -> Audit:
    """Return the best lower bound on epsilon that canaries' scores give.

    The highest scores are guessed to have taken part and as many of the lowest not to; several numbers of guesses are
    tried, and the confidence is that of all of them together.

    Args:
        scores: a canary's, higher where it looks more as if it had taken part.
        included: whether it did. delta: of the promise.
        confidence: probability, at least, that the bound holds.
    """
    scores, included = np.asarray(scores, dtype=float), np.asarray(included, dtype=bool)
    # a score that is no number says nothing
    order = np.argsort(np.nan_to_num(scores), kind="stable")
    halves = sorted({max(1, int(len(scores) * share / 2)) for share in _SHARES})
    each = 1 - (1 - confidence) / len(halves)
    best = Audit(-1.0, 0, 0, len(scores), confidence)
    for half in halves:
        right = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
        bound = lower_bound(right, 2 * half, len(scores), delta, each)
        if bound > best.lower_bound:
            best = Audit(bound, right, 2 * half, len(scores), confidence)
    return best
