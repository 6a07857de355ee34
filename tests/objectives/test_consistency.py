"""The consistency losses against numbers computed by hand, and against what is known to be wrong."""

import pytest
import torch

from posttrain.objectives.consistency import MODES, loss, mode, terms_of

CLEAN = torch.tensor([[[2, 0, -1], [0, 1, 0], [0.5, 0.5, 0], [0, 0, 0]]], dtype=torch.float64)
FIRST = torch.tensor([[[0.3, -0.1, 0], [0.2, 0, -0.2], [0, 0.4, 0], [0, 0, 0]]], dtype=torch.float64)
SECOND = torch.tensor([[[-0.2, 0.1, 0.1], [0, -0.3, 0.1], [0.1, 0, -0.1], [0, 0, 0]]], dtype=torch.float64)
LABELS = torch.tensor([[-100, 1, 0, 2]])
# T: CE of the clean pass, KL of either noisy one, consistency, the whole with a = 0.5 and lam = 0.1; means of 3 tokens
GOLDEN = {
    1.0: (1.7264369405, 0.0121294005, 0.0083603339, 0.0287525771, 0.8712161616),
    2.0: (1.7264369405, 0.0150534164, 0.0098671385, 0.0359687365, 0.8730454826),
}


@pytest.mark.parametrize("temperature", GOLDEN)
def test_terms_and_the_whole_are_the_golden_numbers(temperature):
    cross_entropy, first, second, consistency, whole = GOLDEN[temperature]
    found = terms_of(CLEAN, (CLEAN + FIRST, CLEAN + SECOND), LABELS, temperature)
    assert found.clean.item() / 3 == pytest.approx(cross_entropy, rel=1e-9)
    assert found.divergence.item() / 3 == pytest.approx((first + second) / 2, rel=1e-8)
    assert found.consistency.item() / 3 == pytest.approx(consistency, rel=1e-8)
    assert loss(found, mode("full", 0.5, 0.1)).item() / 3 == pytest.approx(whole, rel=1e-9)
    alone = terms_of(CLEAN, (CLEAN + FIRST,), LABELS, temperature)
    assert alone.divergence.item() / 3 == pytest.approx(first, rel=1e-8) and not alone.consistency.any()
    # the mask of the labels as they stand, one place off, is a known fault
    moved = terms_of(CLEAN, (CLEAN + FIRST,), LABELS.roll(1), 1.0)
    assert moved.divergence.item() != pytest.approx(alone.divergence.item(), rel=0.01)


def test_each_mode_is_made_of_its_terms():
    found = terms_of(CLEAN, (CLEAN + FIRST, CLEAN + SECOND), LABELS)
    for name in MODES:
        weights = mode(name, 0.3, 0.2)
        expected = sum(weight * term for weight, term in zip(weights[:4], found, strict=True))
        torch.testing.assert_close(loss(found, weights), expected)
        assert weights.passes == (2 if weights.consistency else 1)
    only = found._replace(consistency=torch.full((1,), torch.inf, dtype=torch.float64))
    assert loss(only, mode("ce_kl", 0.3, 0.2)).isfinite()


def test_without_noise_nothing_parts_and_with_all_weight_on_it_cross_entropy_is_left():
    found = terms_of(CLEAN, (CLEAN, CLEAN), LABELS)
    assert not found.divergence.any() and not found.consistency.any()
    assert torch.equal(loss(found, mode("full", 1.0, 0.1)), found.clean)
    assert torch.equal(found.noisy, found.clean)


def test_what_is_compared_with_has_no_gradient():
    clean, first, second = ((CLEAN + moved).requires_grad_() for moved in (0, FIRST, SECOND))
    found = terms_of(clean, (first, second), LABELS)
    (found.divergence + found.consistency).sum().backward()
    assert clean.grad is None or not clean.grad.any()
    assert first.grad.any() and second.grad.any()
    second.grad = None
    terms_of(clean, (first, second), LABELS).consistency.sum().backward()
    assert second.grad is None
    # nothing of unlearned places
    assert not first.grad[0, -1].any()
