"""Settings that are refused before any weight is read."""

import pytest
from datasets import DatasetDict

from posttrain import PolicyGradientConfig, PolicyGradientTrainer, RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.trainers import _checks
from tests.conftest import make_pairs


@pytest.fixture
def weightless(tiny_folder, tmp_path):
    """A model folder of which loading would fail: what is refused with it was refused before."""
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"attn_implementation": "spda"},
            "attn_implementation is 'spda'; it must be one of eager, .* Did you mean sdpa",
        ),
        (
            {"attn_implementation": "flash"},
            "attn_implementation is 'flash'; it must be one of eager, .*flash_attention_2",
        ),
        ({"dtype": "bfloat"}, "dtype is 'bfloat'; it must be one of auto, bfloat16, .*Did you mean bfloat16"),
    ],
)
def test_loading_settings_are_refused_before_the_model_loads(weightless, tmp_path, kwargs, message):
    args = RobustDPOConfig(str(tmp_path / "out"), model_init_kwargs=kwargs)
    with pytest.raises(ConfigError, match=message):
        RobustDPOTrainer(weightless, args=args, train_dataset=make_pairs(4))


@pytest.mark.parametrize("name", ["eager", "sdpa", "kernels-community/flash-attn2", None])
def test_attention_that_transformers_knows_passes(name):
    _checks.check_loading({"attn_implementation": name, "dtype": "float32"})


@pytest.mark.parametrize("name", ["beta", "beta_prime", "learning_rate"])
def test_none_in_the_place_of_a_number_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"^{name} is None; it takes a number.$"):
        RobustDPOConfig(str(tmp_path), **{name: None})


def test_only_a_neutral_infinity_is_taken(tmp_path):
    assert RobustDPOConfig(str(tmp_path), reduction="dr_dpo", beta_prime=float("inf")).beta_prime == float("inf")
    with pytest.raises(ConfigError, match="^num_train_epochs is inf; it must be a finite number.$"):
        RobustDPOConfig(str(tmp_path), num_train_epochs=float("inf"))


def test_a_schedule_with_the_settings_that_it_needs_passes(tmp_path):
    settings = dict(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 3})
    assert RobustDPOConfig(str(tmp_path), **settings, optim="adamw_8bit").optim == "adamw_8bit"


def test_a_model_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="^model is None; give a hub id, a folder's path as text, or a loaded model"):
        RobustDPOTrainer(None, args=RobustDPOConfig(str(tmp_path / "out")), train_dataset=make_pairs(4))


def test_several_splits_in_the_place_of_one_are_refused(tiny_folder, tmp_path):
    splits = DatasetDict(train=make_pairs(4), test=make_pairs(4))
    with pytest.raises(DataError, match=r"^train_dataset is a DatasetDict; give one of its splits: train, test\.$"):
        RobustDPOTrainer(tiny_folder, args=RobustDPOConfig(str(tmp_path / "out")), train_dataset=splits)
    args = PolicyGradientConfig(str(tmp_path / "out"), num_generations=2)
    with pytest.raises(DataError, match=r"^train_dataset is a DatasetDict; give one of its splits: train, test\.$"):
        PolicyGradientTrainer(tiny_folder, str.isdigit, args, train_dataset=splits)


def test_reporters_are_refused_with_the_nearest_name(tmp_path):
    for value in ("wandbb", ["tensorboard", "wandbb"]):
        with pytest.raises(ConfigError, match="report_to is 'wandbb'; it must be one of .*, none. Did you mean wandb?"):
            RobustDPOConfig(str(tmp_path), report_to=value)
    assert RobustDPOConfig(str(tmp_path), report_to="none").report_to == []


def test_a_reporter_that_is_not_installed_is_an_issue_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(_checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(EnvironmentIssue, match="report_to names wandb, which is not installed here"):
        RobustDPOConfig(str(tmp_path), report_to="wandb")
    assert RobustDPOConfig(str(tmp_path), report_to="tensorboard").report_to == ["tensorboard"]


def test_a_missing_package_is_an_issue_of_the_environment():
    with pytest.raises(EnvironmentIssue, match="these settings need a package that is missing: no flash_attn"):
        with _checks.upstream_refusals():
            raise ImportError("no flash_attn")


def test_an_unreachable_model_and_an_unreachable_data_set_end_alike(tmp_path):
    from posttrain.data.preferences import load_preferences

    with pytest.raises(EnvironmentIssue, match="model 'org/gone' is no folder here .* the hub cannot be reached"):
        RobustDPOTrainer("org/gone", args=RobustDPOConfig(str(tmp_path)), train_dataset=make_pairs(4))
    with pytest.raises(EnvironmentIssue, match="data set 'org/gone' is no file or folder here, and the hub cannot"):
        load_preferences("org/gone")


def test_a_model_folder_that_is_missing_is_a_setting_to_mend(tmp_path):
    with pytest.raises(ConfigError, match="model './no-such-model' is a folder that does not exist"):
        RobustDPOTrainer("./no-such-model", args=RobustDPOConfig(str(tmp_path)), train_dataset=make_pairs(4))


@pytest.mark.parametrize("family", ["preference", "policy_gradient"])
def test_what_this_machine_cannot_carry_out_is_refused_before_the_model_loads(
    weightless, family, tmp_path, monkeypatch
):
    monkeypatch.setattr(_checks, "is_liger_kernel_available", lambda: False)
    kind, config = {
        "preference": (RobustDPOTrainer, RobustDPOConfig),
        "policy_gradient": (PolicyGradientTrainer, PolicyGradientConfig),
    }[family]
    plain = dict(use_cpu=True, bf16=False)
    given = {"train_dataset": make_pairs(4)}
    if family == "policy_gradient":
        given = {"reward_funcs": "exact_match", **given}
    with pytest.raises(EnvironmentIssue, match="use_liger_kernel is true, which needs the package liger-kernel"):
        kind(weightless, args=config(str(tmp_path / "1"), use_liger_kernel=True, **plain), **given)
    if family == "preference":
        with pytest.raises(ConfigError, match="activation_offloading is true, and there is no accelerator"):
            kind(weightless, args=config(str(tmp_path / "2"), activation_offloading=True, **plain), **given)
