"""Epsilon of steps and noise for an epsilon: against figures of two libraries, and against closed forms."""

import math

import pytest

from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.privacy import accounting
from posttrain.privacy.accounting import Steps, epsilon, solve_noise

DELTA = 1e-5
PLAIN = Steps(noise_multiplier=1.0, rate=0.01, cap=None, units=10_000, steps=1000)


def of_gaussian(noise: float, delta: float) -> float:
    """Epsilon of the plain Gaussian mechanism, exactly (arXiv 1805.06530, theorem 8), by bisection."""

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    low, high = 0.0, 100.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        a = 0.5 / noise
        spent = normal(a - middle * noise) - math.exp(middle) * normal(-a - middle * noise)
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


def test_plain_poisson_steps_spend_what_two_libraries_say():
    # dp-accounting 0.6.0 at intervals of 1e-3 and 1e-4: 1.828934, 1.828244; Opacus' PRV accountant 1.838372
    assert epsilon([PLAIN], DELTA) == pytest.approx(1.828934, abs=2e-6)
    assert 1.828244 < epsilon([PLAIN], DELTA) < 1.828244 + 0.001 < 1.838372
    # RDP of dp-accounting 2.101366, of Opacus 2.101365
    assert epsilon([PLAIN], DELTA, "rdp") == pytest.approx(2.101366, abs=2e-6)


def test_replacing_a_unit_costs_more_than_adding_one():
    assert epsilon([PLAIN], DELTA, neighbours="replace_one") == pytest.approx(2.843, abs=0.002)


def test_a_rate_of_one_is_the_plain_gaussian():
    for noise, steps in ((1.0, 1), (4.0, 10), (20.0, 100)):
        kind = Steps(noise, 1.0, None, 100, steps)
        assert epsilon([kind], DELTA) == pytest.approx(of_gaussian(noise / math.sqrt(steps), DELTA), abs=2e-3)
    # 1,000 steps of noise 30: dp-accounting's own figure of the plain Gaussian
    assert of_gaussian(30 / math.sqrt(1000), DELTA) == pytest.approx(4.652985, abs=1e-6)
    assert epsilon([Steps(30.0, 1.0, None, 100, 1000)], DELTA) == pytest.approx(4.652985, abs=1e-3)


def test_steps_without_noise_spend_all_and_no_steps_nothing():
    assert epsilon([PLAIN, PLAIN._replace(noise_multiplier=0.0, steps=1)], DELTA) == math.inf
    assert epsilon([], DELTA) == epsilon([PLAIN._replace(steps=0)], DELTA) == 0.0


def test_a_history_counts_whatever_its_order_and_its_parts():
    half, other = PLAIN._replace(steps=500), PLAIN._replace(noise_multiplier=2.0, steps=300)
    assert epsilon([half, half], DELTA) == epsilon([PLAIN], DELTA)
    assert epsilon([half, other, half], DELTA) == epsilon([other, PLAIN], DELTA) > epsilon([PLAIN], DELTA)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_grows_with_steps_rate_and_less_noise_and_falls_with_delta(accountant):
    def spent(delta=DELTA, **changed):
        return epsilon([PLAIN._replace(**dict(steps=100) | changed)], delta, accountant)

    assert spent() < spent(steps=200) < spent(steps=400)
    assert spent() < spent(rate=0.02) < spent(rate=0.04)
    assert spent() > spent(noise_multiplier=1.5) > spent(noise_multiplier=3.0)
    assert spent(1e-7) > spent(1e-6) > spent(1e-4)


def test_a_cap_of_six_roots_costs_nothing_and_one_at_the_number_expected_much():
    free = epsilon([PLAIN], DELTA)
    capped = {roots: epsilon([PLAIN._replace(cap=100 + 10 * roots)], DELTA) for roots in (6, 4, 2, 0)}
    assert capped[6] == pytest.approx(free, rel=1e-3) and capped[6] >= free
    assert capped[6] < capped[4] < capped[2] < capped[0]
    assert capped[0] > 4 * free
    # a cap that no draw can reach is none
    assert epsilon([PLAIN._replace(cap=10_000)], DELTA) == free


def test_noise_is_solved_for_an_epsilon_and_keeps_it():
    given = dict(rate=0.01, cap=None, units=10_000, steps=1000)
    noise = solve_noise(6.0, DELTA, **given)
    # 0.642484 at intervals of 1e-4; Opacus' PRV 0.642853
    assert noise == pytest.approx(0.642484, rel=5e-4) and noise >= 0.642484
    kind = PLAIN._replace(noise_multiplier=noise)
    assert 6.0 * (1 - 1e-4) < epsilon([kind], DELTA) <= 6.0
    assert epsilon([kind._replace(steps=1001)], DELTA) > 6.0
    assert solve_noise(6.0, DELTA, **given, accountant="rdp") == pytest.approx(0.676543, abs=2e-6)
    assert solve_noise(math.inf, DELTA, **given) == 0.0


def test_noise_is_solved_once():
    given = dict(rate=0.013, cap=None, units=1000, steps=20, accountant="rdp")
    solve_noise(2.0, DELTA, **given)
    before = accounting._epsilon.cache_info().misses
    solve_noise(2.0, DELTA, **given)
    assert accounting._epsilon.cache_info().misses == before


def test_promises_that_no_noise_or_hardly_any_keeps_are_refused():
    with pytest.raises(ConfigError, match="target_epsilon is 1e-09 .* more than 1e.06 times clip_norm"):
        solve_noise(1e-9, DELTA, rate=1.0, cap=None, units=10, steps=1000, accountant="rdp")
    with pytest.raises(
        ConfigError, match="target_epsilon is 1000, which 1 steps would keep with noise of less than 0.1"
    ):
        solve_noise(1000.0, DELTA, rate=1.0, cap=None, units=10, steps=1, accountant="rdp")


def test_divergences_have_no_bound_for_caps_and_replacements():
    with pytest.raises(ConfigError, match="accountant is rdp, and a step takes at most 160 of 10000 units"):
        epsilon([PLAIN._replace(cap=160)], DELTA, "rdp")
    with pytest.raises(ConfigError, match="accountant is rdp and neighbours is replace_one"):
        epsilon([PLAIN], DELTA, "rdp", "replace_one")
    assert epsilon([PLAIN._replace(cap=10_000)], DELTA, "rdp") == epsilon([PLAIN], DELTA, "rdp")


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setattr("posttrain.errors.find_spec", lambda name: None)
    with pytest.raises(EnvironmentIssue, match=r'dp_accounting: pip install "posttrain\[dp\]"'):
        epsilon([PLAIN._replace(steps=77)], DELTA)
    # nothing to add up
    assert epsilon([], DELTA) == 0.0


def test_a_cap_is_bounded_by_how_rarely_it_is_reached_as_well():
    """Another bound: what differs from a mechanism with probability p has its epsilon at delta + (1 + e^epsilon) p."""
    from scipy.stats import binom

    capped = epsilon([PLAIN._replace(cap=170)], DELTA)
    reached = PLAIN.steps * binom.sf(170, PLAIN.units, PLAIN.rate)
    second = epsilon([PLAIN], DELTA - (1 + math.exp(capped)) * reached)
    assert capped == pytest.approx(second, rel=0.03) and reached > 0


def test_opacus_adds_up_to_the_same():
    from opacus.accountants import PRVAccountant, RDPAccountant

    account = RDPAccountant()
    account.history = [(1.0, 0.01, 1000)]
    assert account.get_epsilon(DELTA) == pytest.approx(epsilon([PLAIN], DELTA, "rdp"), abs=1e-5)
    account = PRVAccountant()
    account.history = [(1.0, 0.01, 1000)]
    assert epsilon([PLAIN], DELTA) <= account.get_epsilon(DELTA) == pytest.approx(1.838372, abs=1e-4)
