"""The plan of a private run: what follows from its settings, and what is refused."""

import math

import pytest

from posttrain.errors import ConfigError
from posttrain.privacy.config import PrivacyConfig
from posttrain.privacy.plan import plan

RUN = dict(rows=16, ranks=1, accumulation=None, max_steps=-1, epochs=3)


def made(units=10_000, privacy=None, **settings):
    given = dict(target_epsilon=math.inf, expected_batch_size=256) | (privacy or {})
    return plan(PrivacyConfig(**given), units, **RUN | settings)


def test_rate_cap_steps_and_micro_batches_follow_from_the_units():
    found = made()
    # 256 + 6 * 16 units at most, in micro-batches of 16; 10000 / 256 = 39.06 steps an epoch
    assert (found.rate, found.cap, found.micro_batches) == (0.0256, 352, 22)
    assert (found.steps_an_epoch, found.steps) == (40, 120)
    assert made(ranks=2).micro_batches == 11 and made(ranks=3).micro_batches == 8
    assert made(max_steps=7).steps == 7 and made(epochs=0.001).steps == 1
    assert made(accumulation=30).micro_batches == 30
    # no draw is larger than the data
    small = made(units=256)
    assert (small.rate, small.cap, small.micro_batches, small.steps_an_epoch) == (1.0, 256, 16, 1)


def test_people_have_their_rows_in_one_micro_batch():
    people = dict(privacy_unit_column="user", rows_per_unit=5)
    assert made(privacy=people).micro_batches == math.ceil(352 / 3)
    with pytest.raises(ConfigError, match="rows_per_unit is 5, and per_device_train_batch_size is 4"):
        made(privacy=people, rows=4)


def test_too_few_micro_batches_are_refused_with_the_number_needed():
    said = "gradient_accumulation_steps is 21, and a step of expected_batch_size 256 may draw 352 units, which need 22"
    with pytest.raises(ConfigError, match=said):
        made(accumulation=21)
    assert made(accumulation=22).micro_batches == 22


@pytest.mark.parametrize("run", [dict(max_steps=1_000_001), dict(epochs=25_001), dict(max_steps=500_001, turns=2)])
def test_more_steps_than_are_accounted_for_are_refused_at_once(run):
    with pytest.raises(
        ConfigError, match=r"comes to 100\d{4} steps, and privacy is accounted for over 1000000 at most"
    ):
        made(privacy=dict(target_epsilon=3.0), **run)
    # without a promise nothing is accounted for
    assert made(**run).epsilon is None


def test_without_noise_nothing_is_promised():
    found = made()
    assert (found.noise_multiplier, found.epsilon) == (0.0, None) and "none is promised" in found.told()["epsilon"]


@pytest.mark.slow
def test_noise_is_solved_for_the_steps_of_the_run_and_the_epsilon_of_given_noise_is_told():
    pytest.importorskip("dp_accounting")
    # no draw is above the data, whose accounting is quicker
    run = dict(units=60)
    solved = made(**run, privacy=dict(target_epsilon=3.0, expected_batch_size=30))
    assert 3.0 * (1 - 1e-3) < solved.epsilon <= 3.0 * (1 + 1e-9)
    longer = made(**run, privacy=dict(target_epsilon=3.0, expected_batch_size=30), max_steps=1000)
    assert longer.noise_multiplier > solved.noise_multiplier > 0.3
    given = dict(target_epsilon=None, noise_multiplier=solved.noise_multiplier, expected_batch_size=30)
    told = made(**run, privacy=given)
    assert told.epsilon == pytest.approx(solved.epsilon) and told.told()["epsilon"] == pytest.approx(3.0, rel=1e-3)
    assert solved.kind.noise_multiplier == solved.noise_multiplier and solved.kind.steps == 0
