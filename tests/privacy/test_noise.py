"""Noise of a private step: its distribution, its independence, and that no seed moves it."""

import math
import random

import pytest
import torch

from posttrain.privacy import noise
from posttrain.privacy.noise import gaussian


def known(seed=0):
    return random.Random(seed).randbytes


def test_it_is_normal_with_the_deviation_asked_for():
    made = gaussian(400_000, 2.5, known()) / 2.5
    assert made.dtype == torch.float64
    # four standard errors of each moment; half the deviation is 700 of them away
    for power, expected, spread in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(made.pow(power).mean().item() - expected) < 4 * math.sqrt(spread / 400_000), power
    ordered = made.sort().values
    theirs = torch.special.ndtr(ordered)
    steps = torch.arange(1, 400_001, dtype=torch.float64) / 400_000
    # Kolmogorov and Smirnov at one in a thousand
    assert (theirs - steps).abs().max() < 1.95 / math.sqrt(400_000)


@pytest.mark.parametrize("lag", [1, 2, noise._CHUNK // 2, noise._CHUNK])
def test_values_do_not_tell_of_each_other(lag):
    # the two of one transform are half a chunk apart
    made = gaussian(4 * noise._CHUNK, 1.0, known())
    for power in (1, 2):
        first, second = made[:-lag].pow(power), made[lag:].pow(power)
        correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
        assert abs(correlation.item()) < 4 / math.sqrt(len(first))


@pytest.mark.parametrize("count", [0, 1, 2, 3, noise._CHUNK - 1, noise._CHUNK, noise._CHUNK + 1])
def test_any_number_of_values_is_given(count):
    made = gaussian(count, 1.0)
    assert made.shape == (count,) and torch.isfinite(made).all() and (made == 0).sum() == 0


def test_the_extremes_of_the_random_bits_are_finite():
    assert torch.isfinite(gaussian(6, 1.0, lambda size: bytes(size))).all()
    largest = gaussian(6, 1.0, lambda size: b"\xff" * size)
    assert torch.isfinite(largest).all()
    # the longest is of the least number
    assert gaussian(2, 1.0, lambda size: bytes(size)).abs().max() == pytest.approx(math.sqrt(2 * 53 * math.log(2)))


def test_no_seed_gives_the_same_noise_again():
    def drawn():
        torch.manual_seed(0)
        random.seed(0)
        return gaussian(64, 1.0)

    assert not torch.equal(drawn(), drawn())
    state = torch.get_rng_state()
    gaussian(64, 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(gaussian(64, 1.0, known(3)), gaussian(64, 1.0, known(3)))


def test_threads_draw_parts_that_have_nothing_in_common(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked.append(1) or 3)
    parts = gaussian(5 * noise._CHUNK, 2.0).view(5, -1) / 2.0
    assert asked
    # five standard errors
    assert ((parts.pow(2).mean(dim=1) - 1).abs() < 5 * math.sqrt(2 / noise._CHUNK)).all()
    apart = torch.corrcoef(parts) - torch.eye(5)
    assert apart.abs().max() < 5 / math.sqrt(noise._CHUNK)
