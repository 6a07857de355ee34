"""Golden numbers are closed forms computed apart from the code; inputs G are four pairs at beta 0.1."""

import math

import pytest
import torch
import torch.nn.functional as F

from posttrain.objectives.preference import cdpo, dpo, dr_dpo, dr_dpo_weights, hinge, ipo, rdpo, rdpo_kappa

CHOSEN = torch.tensor([-12.3, -40.1, -25.0, -7.75], dtype=torch.float64)
REJECTED = torch.tensor([-14.9, -38.6, -25.5, -9.0], dtype=torch.float64)
REF_CHOSEN = torch.tensor([-13.0, -41.0, -24.2, -8.0], dtype=torch.float64)
REF_REJECTED = torch.tensor([-14.5, -40.0, -26.0, -8.2], dtype=torch.float64)
H = (CHOSEN - REF_CHOSEN) - (REJECTED - REF_REJECTED)
Z = 0.1 * H
WIDE = torch.tensor([-30, -2, -0.5, 0, 0.5, 2, 30], dtype=torch.float64)


def close(actual, expected, tolerance=2e-9):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def test_margins_of_the_golden_inputs():
    close(H, [1.1, -0.5, -1.3, 1.05], 1e-12)


@pytest.mark.parametrize(
    ("flip_rate", "expected", "mean"),
    [
        (0.0, [0.639658919, 0.718459648, 0.760258195, 0.642024673], 0.690100359),
        (0.1, [0.625908919, 0.724709648, 0.776508195, 0.628899673], 0.689006609),
        (0.2, [0.602992252, 0.735126315, 0.803591528, 0.607024673], 0.687183692),
        (0.4, [0.419658919, 0.818459648, 1.020258195, 0.432024673], 0.672600359),
    ],
)
def test_rdpo_golden_numbers(flip_rate, expected, mean):
    close(rdpo(Z, flip_rate), expected)
    close(rdpo(Z, flip_rate).mean(), mean)


def test_cdpo_golden_numbers():
    close(cdpo(Z, 0.1), [0.650658919, 0.713459648, 0.747258195, 0.652524673])
    close(cdpo(Z, 0.1).mean(), 0.690975359)


@pytest.mark.parametrize(
    ("flip_rate", "expected"),
    [
        (0.2, [40.0, 2.793594678, 1.140743651, 0.693147181, 0.307410318, -0.539738656, -10.0]),
        (0.1, [33.75, 2.376928011, 1.036576984, 0.693147181, 0.411576984, -0.123071989, -3.75]),
    ],
)
def test_rdpo_over_a_wide_range(flip_rate, expected):
    close(rdpo(WIDE, flip_rate), expected)


def test_rdpo_equals_its_defining_quotient():
    # [(1-e) softplus(-z) - e softplus(z)] / (1-2e), in plain Python floats
    for flip_rate in (0.05, 0.3, 0.45, 0.49):
        quotient = [
            ((1 - flip_rate) * softplus(-z) - flip_rate * softplus(z)) / (1 - 2 * flip_rate) for z in WIDE.tolist()
        ]
        close(rdpo(WIDE, flip_rate), quotient, 1e-9)


@pytest.mark.parametrize(
    ("flip_rate", "weights"),
    [
        (0.0, [0.472527696, 0.512497396, 0.532454306, 0.473774091]),
        (0.1, [0.597527696, 0.637497396, 0.657454306, 0.598774091]),
    ],
)
def test_rdpo_gradient_weight_is_sigmoid_plus_kappa(flip_rate, weights):
    z = Z.clone().requires_grad_()
    rdpo(z, flip_rate).sum().backward()
    close(-z.grad, weights)


def test_kappa_table():
    for flip_rate, kappa in [(0.1, 0.125), (0.2, 1 / 3), (0.3, 0.75), (0.4, 2.0), (0.45, 4.5), (0.49, 24.5)]:
        assert rdpo_kappa(flip_rate) == pytest.approx(kappa, rel=1e-12)


def test_rdpo_is_unbiased_for_the_clean_loss():
    # (1-e) l_e(z) + e l_e(-z) = l(z)
    for flip_rate in (0.1, 0.3, 0.45):
        mixed = (1 - flip_rate) * rdpo(WIDE, flip_rate) + flip_rate * rdpo(-WIDE, flip_rate)
        close(mixed, dpo(WIDE), 1e-12)


def test_swapping_a_pair_changes_rdpo_by_a_line():
    for flip_rate in (0.1, 0.3):
        close(rdpo(WIDE, flip_rate) - rdpo(-WIDE, flip_rate), -WIDE * (1 + 2 * rdpo_kappa(flip_rate)), 1e-12)


def test_rdpo_without_flips_is_dpo_bit_for_bit():
    z = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 8
    for loss in (rdpo(z, 0.0), cdpo(z, 0.0), rdpo(z, torch.zeros(4096))):
        assert torch.equal(loss, -F.logsigmoid(z))
    assert not torch.equal(F.softplus(-z), -F.logsigmoid(z)), "softplus would have been bit-equal: the form is free"


def test_flip_rate_per_pair():
    rates = torch.tensor([0.0, 0.1, 0.2, 0.4], dtype=torch.float64)
    close(rdpo(Z, rates), [rdpo(z, float(r)).item() for z, r in zip(Z, rates, strict=True)], 1e-12)
    close(cdpo(Z, rates), [cdpo(z, float(r)).item() for z, r in zip(Z, rates, strict=True)], 1e-12)


def test_mean_rdpo_gradient_over_flips_is_the_clean_dpo_gradient():
    generator = torch.Generator().manual_seed(0)
    pairs, draws, rate = 64, 4000, 0.3
    features = torch.randn(pairs, 5, generator=generator, dtype=torch.float64)
    weights = torch.randn(5, generator=generator, dtype=torch.float64)
    signs = 1 - 2 * (torch.rand(draws, pairs, generator=generator, dtype=torch.float64) < rate).double()
    z = features @ weights

    def gradients(loss, flip_rate):
        # d loss(s z) / d w per draw, for every draw of label signs s
        scaled = (signs * z).requires_grad_()
        (slope,) = torch.autograd.grad(loss(scaled, flip_rate).sum(), scaled)
        return (slope * signs) @ features / pairs

    clean = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(dpo(clean).sum(), clean)
    target = slope @ features / pairs
    robust, plain = gradients(rdpo, rate), gradients(rdpo, 0.0)
    errors = (robust.mean(0) - target) / (robust.std(0) / draws**0.5)
    assert errors.abs().max() < 4
    assert ((plain.mean(0) - target) / (plain.std(0) / draws**0.5)).abs().max() > 40


@pytest.mark.parametrize("rate", [0.5, 0.7, -0.1, float("nan")])
@pytest.mark.parametrize("loss", [rdpo, cdpo])
def test_impossible_flip_rates_raise(loss, rate):
    with pytest.raises(ValueError, match=r"flip_rate is .*must lie in \[0, 0\.5\)"):
        loss(Z, rate)
    with pytest.raises(ValueError, match=r"flip_rate is .*must lie in \[0, 0\.5\)"):
        loss(Z, torch.tensor([0.1, 0.2, 0.3, rate], dtype=torch.float64))


def test_hinge_and_ipo():
    close(hinge(torch.tensor([-1.0, 0.25, 1.0, 3.0])), [2.0, 0.75, 0.0, 0.0])
    close(ipo(torch.tensor([0.0, 5.0, 7.0], dtype=torch.float64), 0.1), [25.0, 0.0, 4.0])
    with pytest.raises(ValueError, match="tau is 0"):
        ipo(Z, 0)


@pytest.mark.parametrize(
    ("beta_prime", "objective", "weights"),
    [
        (0.1, 0.677830183, [0.366197777, 0.166528467, 0.109637646, 0.357636110]),
        (0.5, 0.687480165, [0.275091402, 0.234980364, 0.216135356, 0.273792879]),
        (1.0, 0.688783460, [0.262587789, 0.242689957, 0.232754950, 0.261967305]),
        (5.0, 0.689836027, [0.252521486, 0.248572908, 0.246503572, 0.252402034]),
    ],
)
def test_dr_dpo_golden_numbers(beta_prime, objective, weights):
    close(dr_dpo(dpo(Z), beta_prime), objective)
    close(dr_dpo_weights(dpo(Z), beta_prime), weights)


@pytest.mark.parametrize(
    ("beta_prime", "objective", "weights", "slopes"),
    [
        (
            0.5,
            0.561949168,
            [0.432978730, 0.109640331, 0.035280921, 0.422100018],
            [-0.108132062, -0.068246647, -0.027724982, -0.109418920],
        ),
        (
            1.0,
            0.652609695,
            [0.360227324, 0.181271087, 0.102828460, 0.355673129],
            [-0.089963134, -0.112833880, -0.080806201, -0.092199403],
        ),
        (
            2.0,
            0.710436712,
            [0.308898150, 0.219124658, 0.165037884, 0.306939308],
            [-0.077144191, -0.136396188, -0.129692543, -0.079566373],
        ),
    ],
)
def test_dr_dpo_golden_gradients_at_beta_one(beta_prime, objective, weights, slopes):
    z = H.clone().requires_grad_()
    value = dr_dpo(dpo(z), beta_prime)
    close(value, objective)
    close(dr_dpo_weights(dpo(z), beta_prime), weights)
    value.backward()
    close(z.grad, slopes)


def test_weighted_surrogate_has_the_gradient_of_dr_dpo():
    z = H.clone().requires_grad_()
    (direct,) = torch.autograd.grad(dr_dpo(dpo(z), 0.7), z)
    (surrogate,) = torch.autograd.grad((dr_dpo_weights(dpo(z), 0.7) * dpo(z)).sum(), z)
    close(direct, surrogate, 1e-14)
    assert torch.autograd.gradcheck(lambda z: dr_dpo(dpo(z), 0.7), z)


def test_dr_dpo_depends_on_its_batch():
    losses = dpo(H)
    pairs = {(0, 1, 2, 3): 0.652609695}
    halves = [((0, 1), (2, 3), 0.656065849), ((0, 2), (1, 3), 0.655346924)]
    for rows, value in pairs.items():
        close(dr_dpo(losses[list(rows)], 1.0), value)
    for first, second, value in halves:
        close((dr_dpo(losses[list(first)], 1.0) + dr_dpo(losses[list(second)], 1.0)) / 2, value)
    close(torch.stack([dr_dpo(losses[i : i + 1], 1.0) for i in range(4)]).mean(), 0.775619811)


def test_dr_dpo_invariants():
    losses = torch.rand(33, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6
    for beta_prime in (0.05, 0.3, 1.0, 7.0):
        value = dr_dpo(losses, beta_prime)
        assert losses.min() <= value <= losses.mean()
        close(dr_dpo(losses + 2.5, beta_prime), value + 2.5, 1e-9)
        close(dr_dpo(losses.flip(0), beta_prime), value, 1e-12)
        close(dr_dpo(losses.repeat(3), beta_prime), value, 1e-12)
        close(dr_dpo_weights(losses, beta_prime).sum(), 1.0, 1e-12)
    values = [dr_dpo(losses, b).item() for b in (0.05, 0.3, 1.0, 7.0, 100.0, math.inf)]
    assert values == sorted(values)


def test_dr_dpo_limits():
    losses = dpo(H)
    assert torch.equal(dr_dpo(losses, math.inf), losses.mean())
    assert torch.equal(dr_dpo_weights(losses, math.inf), torch.full((4,), 0.25, dtype=torch.float64))
    close(dr_dpo(dpo(Z), 1e6), 0.690100357, 3e-9)
    close(dr_dpo(losses, 1e-3), losses.min(), 2e-3)
    for beta_prime in (0.1, 1.0, 10.0):
        close(dr_dpo(losses[:1], beta_prime), losses[0], 1e-12)


def test_dr_dpo_stays_finite_where_the_plain_formula_overflows():
    losses = torch.tensor([50.0, 60.0, 70.0])
    assert torch.isinf(-0.1 * torch.log(torch.exp(-losses / 0.1).mean()))
    close(dr_dpo(losses, 0.1), 50.109859, 5e-6)
    close(dr_dpo(losses, 0.5), 50.549305, 5e-6)
    assert dr_dpo(losses.bfloat16(), 1.0).dtype == torch.float32


@pytest.mark.parametrize("beta_prime", [0.0, -1.0, float("nan")])
def test_impossible_beta_prime_raises(beta_prime):
    for function in (dr_dpo, dr_dpo_weights):
        with pytest.raises(ValueError, match="beta_prime is .*must be above 0"):
            function(dpo(Z), beta_prime)


def test_dr_dpo_needs_losses():
    with pytest.raises(ValueError, match=r"losses has shape \(0,\)"):
        dr_dpo(torch.empty(0), 1.0)
