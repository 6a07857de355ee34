"""Noise on hidden states: golden scales, sequences that know nothing of each other."""

import pytest
import torch

from posttrain.mechanisms.noise import draws, hidden

STATES = torch.tensor([[1, -2, 0.5, 4], [0.1, 0.2, -0.3, 0.05]])
GOLDEN = [
    [0.2262093998, 0.1516328166, 0.25, 0.1241464998],
    [0.0045947784, 0.0037619014, 0.0025216981, 0.0050780053],
]
TOGETHER = draws.sequences(torch.ones(1, 2, dtype=torch.long))


def test_scales_and_the_ratio_are_the_golden_numbers():
    torch.testing.assert_close(hidden.scales(STATES, TOGETHER, 0.1), torch.tensor(GOLDEN), rtol=1e-5, atol=1e-8)
    # version 1: the standard deviation of the states in the base as well
    by_std = hidden.scales(STATES, TOGETHER, 0.1, by_std=True)
    torch.testing.assert_close(by_std, 1.6825655368 * torch.tensor(GOLDEN), rtol=1e-5, atol=1e-8)
    found = hidden.ratio(hidden.signal_and_noise(STATES, TOGETHER, 0.1, by_std=True))
    assert found == pytest.approx(7.9051845797, rel=1e-5)


def test_a_sequences_scales_hang_on_no_neighbour_and_on_no_padding():
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(length, 8, generator=draw) * scale for length, scale in ((3, 1.0), (5, 40.0))]
    alone = [hidden.scales(row, draws.sequences(torch.ones(1, len(row), dtype=torch.long)), 0.1, True) for row in rows]
    flat = draws.sequences(torch.ones(1, 8, dtype=torch.long), None, torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    packed = hidden.scales(torch.cat(rows), flat, 0.1, True)
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = torch.cat([rows[0], torch.full((2, 8), 1e3), rows[1]])
    found = hidden.scales(padded, draws.sequences(torch.ones_like(mask), mask), 0.1, True)
    torch.testing.assert_close(found[mask.flatten().bool()], torch.cat(alone), rtol=1e-5, atol=1e-6)
    # a mean over the whole batch is a known fault
    assert not torch.allclose(
        hidden.scales(torch.cat(rows), draws.sequences(torch.ones(1, 8).long()), 0.1)[:3], alone[0]
    )


def test_a_constant_state_has_almost_no_noise_and_no_division_by_zero():
    found = hidden.scales(torch.full((2, 8), 3.0), TOGETHER, 0.1)
    assert found.isfinite().all() and 0 < found.max() < 1e-5
    assert hidden.scales(torch.zeros(2, 8), TOGETHER, 0.1).max() == 0
