"""Every field of a config says what it means for a run's identity and its card; both are derived from that."""

import dataclasses
import math

import pytest

from posttrain import ALoLConfig, HPTConfig, PolicyGradientConfig, QAEConfig, RobustDPOConfig
from posttrain.config import parse
from posttrain.config.setting import identity_of, meanings, told_in_card, undeclared
from posttrain.errors import ConfigError
from posttrain.run.identity import update_of
from tests.families import METHODS

CONFIGS = (*(method.config for method in METHODS.values()), QAEConfig, HPTConfig)
SMALL = dict(num_generations=4, per_device_train_batch_size=4)


def make(kind, folder, **settings):
    small = SMALL if issubclass(kind, PolicyGradientConfig) else {}
    return kind(output_dir=str(folder), report_to=[], **{**small, **settings})


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_own_field_declares_its_meaning(kind):
    assert undeclared(kind) == []
    assert len(meanings(kind)) > 10


def test_a_field_without_a_meaning_is_found():
    careless = dataclasses.make_dataclass("Careless", [("learning", int, 3)], bases=(RobustDPOConfig,))
    careless.__module__ = "posttrain.trainers.careless"
    assert undeclared(careless) == ["learning"]


# two settings whose updates differ
APART = [
    (PolicyGradientConfig, dict(estimator=dict(preset="hpt_rollouts", reference="one", shaping="luffy")),
     dict(estimator=dict(preset="hpt_rollouts", reference="one"))),
    (PolicyGradientConfig, dict(estimator=dict(preset="hpt_rollouts", reference="policy")),
     dict(estimator=dict(preset="hpt_rollouts"))),
    (PolicyGradientConfig, dict(importance_sampling_level="sequence"), dict(importance_sampling_level="token")),
    (PolicyGradientConfig, dict(delta=3.0), dict()),
    (PolicyGradientConfig, dict(skip_grad_norm=80.0), dict()),
    (PolicyGradientConfig, dict(reward_weights=[2.0]), dict()),
    (PolicyGradientConfig, dict(off_policy_mask_threshold=0.5), dict()),
    (PolicyGradientConfig, dict(sapo_temperature_neg=2.0, loss_type="sapo"), dict(loss_type="sapo")),
    (HPTConfig, dict(sft_coef=0.3), dict()),
    (HPTConfig, dict(success_threshold=0.5), dict()),
    (QAEConfig, dict(quantile=0.3), dict()),
    (RobustDPOConfig, dict(flip_rate=0.2), dict(flip_rate=0.1)),
    (RobustDPOConfig, dict(reduction="dr_dpo", beta_prime=2.0), dict(reduction="dr_dpo")),
    (RobustDPOConfig, dict(truncation_mode="keep_end", max_length=64), dict(max_length=64)),
    (RobustDPOConfig, dict(beta=0.2), dict()),
    (ALoLConfig, dict(clip=0.5), dict()),
    (ALoLConfig, dict(value="head", value_epochs=3), dict(value="head")),
    (ALoLConfig, dict(variant="r_lol"), dict()),
]  # fmt: skip
# two settings whose updates are the same to rounding
ALIKE = [
    (PolicyGradientConfig, dict(estimator="grpo"), dict(estimator=dict(preset="grpo"))),
    (PolicyGradientConfig, dict(success_threshold=1.0), dict()),
    (PolicyGradientConfig, dict(log_completions=True, num_completions_to_print=3), dict()),
    (RobustDPOConfig, dict(prefix_sharing="never"), dict()),
    (RobustDPOConfig, dict(dataset_num_proc=2, precompute_ref_batch_size=2), dict()),
    (ALoLConfig, dict(value_epochs=3), dict()),
    (ALoLConfig, dict(value_head_dir="heads", check_reference=False), dict()),
]


def of_run(args) -> dict:
    return identity_of(args) | update_of(args)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize(("kind", "one", "other"), APART)
def test_settings_with_other_updates_are_other_runs(kind, one, other, tmp_path):
    assert of_run(make(kind, tmp_path, **one)) != of_run(make(kind, tmp_path, **other))


@pytest.mark.parametrize(("kind", "one", "other"), ALIKE)
def test_settings_with_the_same_updates_are_one_run(kind, one, other, tmp_path):
    assert of_run(make(kind, tmp_path, **one)) == of_run(make(kind, tmp_path, **other))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["num_train_epochs", "max_steps", "adam_beta1", "learning_rate", "seed"])
def test_null_for_a_number_is_refused_by_name(kind, name, tmp_path):
    with pytest.raises(ConfigError, match=f"{name} is None; it takes a"):
        make(kind, tmp_path, **{name: None})


def test_infinity_is_a_value_where_the_field_says_so(tmp_path):
    assert math.isinf(make(ALoLConfig, tmp_path, clip=math.inf).clip)
    assert math.isinf(make(RobustDPOConfig, tmp_path, beta_prime=math.inf).beta_prime)
    for kind, name in ((ALoLConfig, "kl_beta"), (RobustDPOConfig, "beta"), (HPTConfig, "sft_coef")):
        with pytest.raises(ConfigError, match=name):
            make(kind, tmp_path, **{name: math.inf})
    with pytest.raises(ConfigError, match="clip"):
        make(ALoLConfig, tmp_path, clip=math.nan)


def test_a_card_tells_inherited_settings_of_a_preset(tmp_path):
    args = make(
        HPTConfig, tmp_path, sft_coef=0.3, success_threshold=0.5, sft_normalization="prompt", skip_grad_norm=80.0
    )
    told = told_in_card(args)
    assert told == {
        "gamma": 0.0, "success_threshold": 0.5, "sft_normalization": "prompt", "sft_coef": 0.3, "skip_grad_norm": 80.0,
    }  # fmt: skip
    assert told_in_card(make(QAEConfig, tmp_path)) == {"advantage": "quantile", "quantile": 0.4}
    # what a variant reads is told at its default too
    assert told_in_card(make(ALoLConfig, tmp_path)) == {
        "variant": "a_lol", "clip": 0.9, "value": "mean", "advantage_weighting": "weight",
    }  # fmt: skip
    assert told_in_card(make(ALoLConfig, tmp_path, variant="nll")) == {"variant": "nll"}


@pytest.mark.parametrize("kind", [PolicyGradientConfig, QAEConfig, HPTConfig])
@pytest.mark.parametrize(
    ("old", "new", "value"),
    [("drop_dead_rows", "drop_zero_advantage_rows", False), ("max_dead_steps", "max_steps_without_gradient", 3)],
)
def test_a_setting_by_its_former_name_is_answered_with_its_name(kind, old, new, value, tmp_path):
    with pytest.raises(ConfigError, match=f"{old} is called {new}"):
        make(kind, tmp_path, **{old: value})
    assert getattr(make(kind, tmp_path, **{new: value}), new) == value
    with pytest.raises(ConfigError, match=f"`{old}` is called `{new}`; write `{new}: "):
        parse((kind,), ["--output_dir", str(tmp_path), f"--{old}", str(value).lower()])
