"""Bounds on epsilon from guesses: figures of the theorem, right runs below their promise, wrong ones above it."""

import math

import numpy as np
import pytest

from posttrain.privacy.audit import audit, lower_bound
from tests.privacy.test_accounting import of_gaussian


def noise_for(epsilon: float, delta: float = 1e-5) -> float:
    low, high = 0.05, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if of_gaussian(middle, delta) > epsilon else (low, middle)
    return high


def scored(noise: float, seed: int, count: int = 2000, signal: float = 1.0):
    generator = np.random.default_rng(seed)
    included = generator.random(count) < 0.5
    return signal * included + noise * generator.standard_normal(count), included


def binomial_tail(right: int, guesses: int, chance: float) -> float:
    return sum(math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k) for k in range(right, guesses + 1))


@pytest.mark.parametrize(("right", "guesses"), [(10, 10), (60, 80), (95, 100), (400, 400)])
def test_without_delta_the_bound_is_of_the_binomial(right, guesses):
    bound = lower_bound(right, guesses, guesses, 0.0)
    assert binomial_tail(right, guesses, 1 / (1 + math.exp(-bound))) == pytest.approx(0.05, rel=1e-4)


def test_all_right_of_ten():
    # q^10 = 0.05: q = 0.741134, epsilon = log(q / (1 - q))
    assert lower_bound(10, 10, 10, 0.0) == pytest.approx(1.0518, abs=1e-4)


def test_delta_costs_by_all_canaries_that_could_have_been_guessed():
    # by hand for 2 guesses of 2: q^2 + 2 m delta max(2q(1-q) / 1, (1 - q^2) / 2) = 0.05 has no root: q is above 1/2
    assert lower_bound(2, 2, 2, 0.0) == 0.0
    bounds = [lower_bound(380, 400, canaries, 1e-5) for canaries in (400, 2000, 20_000)]
    assert lower_bound(380, 400, 400, 0.0) > bounds[0] > bounds[1] > bounds[2] > 0


def test_guesses_no_better_than_chance_bound_nothing():
    assert lower_bound(50, 100, 100, 1e-5) == lower_bound(0, 100, 100, 1e-5) == lower_bound(0, 0, 10, 1e-5) == 0.0
    with pytest.raises(ValueError):
        lower_bound(11, 10, 10, 1e-5)


def test_more_confidence_gives_a_lower_bound():
    assert lower_bound(95, 100, 100, 0.0, 0.95) > lower_bound(95, 100, 100, 0.0, 1 - 1e-6) > 0
    # with so small a chance delta leaves nothing: 2 m delta is 0.002
    assert lower_bound(95, 100, 100, 1e-5, 1 - 1e-6) == 0.0


@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0])
def test_a_right_mechanism_stays_below_its_promise(epsilon):
    noise = noise_for(epsilon)
    bounds = [audit(*scored(noise, seed), 1e-5).lower_bound for seed in range(5)]
    assert max(bounds) < epsilon


@pytest.mark.parametrize("epsilon", [2.0, 4.0])
def test_a_quarter_of_the_noise_and_ten_times_the_norm_are_caught(epsilon):
    noise = noise_for(epsilon)
    for seed in range(5):
        assert audit(*scored(noise / 4, seed), 1e-5).lower_bound > epsilon
        assert audit(*scored(noise, seed, signal=10.0), 1e-5).lower_bound > epsilon


def test_scores_that_say_nothing_bound_nothing():
    included = np.arange(1000) % 2 == 0
    for value in (0.0, math.nan, math.inf):
        assert audit(np.full(1000, value), included, 1e-5).lower_bound == 0.0


def test_the_confidence_is_of_all_numbers_of_guesses_together():
    # without noise the bound hangs on the number of canaries alone
    scores, included = scored(1e-9, 0, count=400)
    found = audit(scores, included, 1e-5)
    assert 0 < found.right <= found.guesses <= found.canaries == 400
    alone = lower_bound(found.right, found.guesses, found.canaries, 1e-5)
    assert found.lower_bound < alone
