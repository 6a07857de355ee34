"""The perturbation of SAM and of FSAM on gradients of a few numbers."""

import math

import pytest
import torch

from posttrain.mechanisms.sharpness import Perturbed, ascent


def gradients():
    return [torch.tensor([[3.0, 0.0], [-1.0, 2.0]]), None, torch.tensor([-4.0, 0.5])]


def test_the_perturbation_is_the_gradient_at_the_length_of_rho():
    made, norm = ascent(gradients(), 0.5)
    assert norm == pytest.approx(math.sqrt(9 + 1 + 4 + 16 + 0.25))
    assert made[1] is None
    torch.testing.assert_close(made[0], gradients()[0] * 0.5 / norm)
    assert sum(one.square().sum() for one in (made[0], made[2])).sqrt() == pytest.approx(0.5)


def test_a_mask_keeps_the_largest_share_over_all_parameters():
    whole, norm = ascent(gradients(), 0.5)
    made, masked = ascent(gradients(), 0.5, 0.5)
    # of six numbers three: 3, 2 and -4, at the size that they have without the mask
    assert (made[0] != 0).tolist() == [[True, False], [False, True]] and (made[2] != 0).tolist() == [True, False]
    assert masked == norm and torch.equal(made[0][made[0] != 0], whole[0][made[0] != 0])


def test_a_mask_of_all_is_no_mask():
    assert all(
        one is other is None or torch.equal(one, other)
        for one, other in zip(ascent(gradients(), 0.1)[0], ascent(gradients(), 0.1, 1.0)[0], strict=True)
    )


def test_a_share_of_less_than_one_weight_keeps_one():
    made, _ = ascent(gradients(), 0.5, 1e-9)
    assert sum(int((one != 0).sum()) for one in made if one is not None) == 1


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_without_a_direction_nothing_is_moved(value):
    made, _ = ascent([torch.full((3,), value)], 0.5)
    assert made == [None]


def test_weights_are_put_back_bit_for_bit_and_once():
    weights = [torch.randn(50, requires_grad=True) for _ in range(3)]
    before = [weight.detach().clone() for weight in weights]
    moved = Perturbed(weights, [torch.full((50,), 0.1), None, torch.full((50,), 1e-3)])
    assert not torch.equal(weights[0], before[0]) and torch.equal(weights[1], before[1])
    moved.put_back()
    assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))
    with torch.no_grad():
        weights[0].add_(1)
    moved.put_back()
    assert torch.equal(weights[0], before[0] + 1)
