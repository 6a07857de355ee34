"""Settings of a private run: what is promised has no default, and what promises nothing says so."""

import math

import numpy as np
import pytest

from posttrain.config import parse
from posttrain.config.setting import identity_of, meanings, told_in_card, undeclared
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.privacy.config import PrivacyConfig

SOME = dict(target_epsilon=3.0, expected_batch_size=64)


def make(**given) -> PrivacyConfig:
    return PrivacyConfig(**SOME | given)


def test_one_of_epsilon_and_noise_is_needed_and_neither_has_a_default():
    assert make().noise_multiplier is None
    assert make(target_epsilon=None, noise_multiplier=1.0).target_epsilon is None
    with pytest.raises(ConfigError, match="target_epsilon and noise_multiplier are both null"):
        make(target_epsilon=None)
    with pytest.raises(ExcludedSetting, match="target_epsilon is 3 and noise_multiplier is 1, which follow"):
        make(noise_multiplier=1)


def test_a_run_without_noise_has_to_say_that_it_promises_nothing():
    with pytest.raises(ConfigError, match="A run without noise says so by `target_epsilon: inf`"):
        make(target_epsilon=None, noise_multiplier=0)
    for epsilon in (math.inf, "inf", ".inf"):
        assert not make(target_epsilon=epsilon, clip_norm="inf").is_private
    assert make().is_private and make(target_epsilon=None, noise_multiplier=0.5).is_private
    with pytest.raises(ConfigError, match="clip_norm is inf, so that one unit may move a step by any amount"):
        make(clip_norm=math.inf)


REFUSED = [
    *(dict(target_epsilon=value) for value in (0, -1, math.nan, True, "x", [3], -math.inf, 10**400)),
    *(
        dict(target_epsilon=None, noise_multiplier=value)
        for value in (-1.0, 0.09, 1e30, math.nan, math.inf, True, "1", 10**400)
    ),
    *(dict(target_delta=value) for value in (0, 1, -1e-5, 1e-13, 1.5, math.nan, math.inf, None, True, "1e-5")),
    *(dict(clip_norm=value) for value in (0, -1.0, 1e-7, 1e7, -math.inf, math.nan, None, False, "x")),
    *(dict(clipping=value) for value in ("per_layer", None, 1, "Flat")),
    *(dict(accountant=value) for value in ("prv", None)),
    *(dict(neighbours=value) for value in ("replace", None)),
    *(dict(expected_batch_size=value) for value in (0, -1, 2.5, None, True, math.nan, "64", 10**400)),
    *(dict(privacy_unit_column="user", rows_per_unit=value) for value in (0, 1.5, None, True)),
    *(dict(privacy_unit_column=value) for value in ("", " ", 3, ["user"])),
    *(dict(publish_private_metrics=value) for value in ("yes", 1, None)),
    *(dict(audit_canaries=value) for value in (-1, 50, 2.5, None, True, 10**7)),
]


@pytest.mark.parametrize("given", REFUSED, ids=lambda given: str(given)[:60])
def test_what_no_setting_can_be_is_refused_by_its_name(given):
    *_, name = given
    with pytest.raises(ConfigError, match=rf"^{name} (is|has)"):
        make(**given)


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(ConfigError, match="rows_per_unit is 4, and without privacy_unit_column"):
        make(rows_per_unit=4)
    with pytest.raises(ConfigError, match="accountant is rdp and neighbours is replace_one"):
        make(accountant="rdp", neighbours="replace_one")
    with pytest.raises(ConfigError, match="audit_canaries is 200 and target_epsilon is inf"):
        make(audit_canaries=200, target_epsilon=math.inf)
    with pytest.raises(ConfigError, match="clip_norm is inf"):
        make(target_epsilon=math.inf, clip_norm=math.inf, clipping="automatic")


def test_a_high_epsilon_is_said_to_promise_little(capsys):
    make(target_epsilon=10)
    assert not capsys.readouterr().err
    make(target_epsilon=10.5)
    assert "target_epsilon is 10.5: above 10 the promise is weak" in capsys.readouterr().err


def test_units_have_to_be_enough_for_the_step_and_for_delta():
    make(target_delta=1e-4).check_units(9_999)
    with pytest.raises(
        ConfigError, match=r"target_delta is 0.0001, and the training data has 10000 units .* such as 1e-5"
    ):
        make(target_delta=1e-4).check_units(10_000)
    make().check_units(64)
    with pytest.raises(ConfigError, match="expected_batch_size is 64, and the training data has 63 units"):
        make().check_units(63)
    # no promise, no delta
    make(target_epsilon=math.inf, target_delta=0.5).check_units(64)
    with pytest.raises(ConfigError, match=r"\(values of user\)"):
        make(privacy_unit_column="user").check_units(10)


def test_numbers_of_numpy_become_pythons_own():
    made = make(target_epsilon=np.float32(3.0), expected_batch_size=np.int64(64))
    assert type(made.target_epsilon) is float and type(made.expected_batch_size) is int


def test_settings_are_read_from_the_command_line():
    words = "--noise_multiplier 0.8 --expected_batch_size 32 --privacy_unit_column user --rows_per_unit 4"
    (made,) = parse((PrivacyConfig,), words.split())
    assert (made.noise_multiplier, made.expected_batch_size, made.rows_per_unit) == (0.8, 32, 4)
    (made,) = parse((PrivacyConfig,), "--target_epsilon inf --expected_batch_size 32".split())
    assert not made.is_private
    with pytest.raises(ConfigError, match="target_epsilon: command line"):
        parse((PrivacyConfig,), "--target_epsilon -1 --expected_batch_size 32".split())


def test_every_field_says_what_it_means():
    assert undeclared(PrivacyConfig) == []
    assert [name for name, meaning in meanings(PrivacyConfig).items() if meaning.identity and not meaning.card] == []
    assert set(identity_of(make())) == set(meanings(PrivacyConfig)) - {"publish_private_metrics"}


def test_a_card_tells_the_promise_at_its_defaults_too():
    assert told_in_card(make()) == {
        "target_epsilon": 3.0, "target_delta": 1e-5, "clip_norm": 1.0, "clipping": "flat", "accountant": "pld",
        "expected_batch_size": 64, "neighbours": "add_remove",
    }  # fmt: skip
    told = told_in_card(make(target_epsilon=math.inf))
    assert told["target_epsilon"] == math.inf and "target_delta" not in told
