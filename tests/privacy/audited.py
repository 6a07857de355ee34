"""Audits of steps, and how likely they are to err about a mechanism that is known."""

import hashlib

import numpy as np
from scipy import special, stats

from posttrain.privacy.audit import _SHARES, lower_bound


def stream(name: str):
    """A source of random bytes that is the same each time."""
    count = iter(range(10**9))
    return lambda size: hashlib.shake_256(f"{name} {next(count)}".encode()).digest(size)


def needed(promise: float, half: int, count: int, delta: float, confidence: float) -> int | None:
    """The least number of right guesses, of twice `half`, whose bound is above a promise; None where none is."""
    low, high = half, 2 * half
    if lower_bound(high, 2 * half, count, delta, confidence) <= promise:
        return None
    while low < high:
        middle = (low + high) // 2
        above = lower_bound(middle, 2 * half, count, delta, confidence) > promise
        low, high = (low, middle) if above else (middle + 1, high)
    return low


def halves_of(count: int) -> list[int]:
    return sorted({max(1, int(count * share / 2)) for share in _SHARES})


def _likelihoods(half: int, count: int, noise: float, signal: float, level: float) -> np.ndarray:
    """How likely each of the `half` highest scores is of a canary that took part, at most: but for 2 half `level`.

    A score is normal of deviation `noise`, moved by `signal` where the canary took part. The share of scores above the
    j-th highest one is Beta(j, count + 1 - j). `level` above 1/2: at least, but for 2 half (1 - `level`).
    """
    places = np.arange(1, half + 1)
    above = special.betaincinv(places, count + 1 - places, level)
    low, high = np.full(half, -50.0 * noise), np.full(half, signal + 50.0 * noise)
    for _ in range(60):
        middle = (low + high) / 2
        tail = (stats.norm.sf(middle, signal, noise) + stats.norm.sf(middle, 0, noise)) / 2
        low, high = np.where(tail > above, middle, low), np.where(tail > above, high, middle)
    return special.expit((signal * low - signal**2 / 2) / noise**2)


def _tail(chances: np.ndarray, right: int, side: int) -> float:
    """Chernoff's bound on so many successes or more (side 1), or fewer (side -1), of independent trials."""
    slopes = side * np.concatenate([[0.0], np.logspace(-4, 1.5, 300)])
    logs = np.log1p(chances * np.expm1(slopes)[:, None]).sum(axis=1) - slopes * (right if side > 0 else right - 1)
    return float(np.exp(min(0.0, logs.min())))


def chance_of_a_false_alarm(promise: float, noise: float, signal: float, count: int, delta: float, confidence=0.95):
    """At most so likely a mechanism with this noise is found to break a promise."""
    halves, total = halves_of(count), 0.0
    for half in halves:
        right = needed(promise, half, count, delta, 1 - (1 - confidence) / len(halves))
        if right is not None:
            chances = np.tile(_likelihoods(half, count, noise, signal, 1e-12), 2)
            total += _tail(chances, right, 1) + 2 * half * 1e-12
    return total


def chance_of_a_miss(promise: float, noise: float, signal: float, count: int, delta: float, confidence=0.95):
    """At most so likely a mechanism with this noise is not found to break a promise."""
    halves, found = halves_of(count), []
    for half in halves:
        right = needed(promise, half, count, delta, 1 - (1 - confidence) / len(halves))
        if right is not None:
            chances = np.tile(_likelihoods(half, count, noise, signal, 1 - 1e-12), 2)
            found.append(_tail(chances, right, -1) + 2 * half * 1e-12)
    return min(found, default=1.0)
