"""Every field of a config says what it means for a run's identity and its card; both are derived from that."""

import contextlib
import copy
import dataclasses
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers.trainer_utils import SchedulerType

from posttrain import ALoLConfig, HPTConfig, NoisySFTConfig, PolicyGradientConfig, QAEConfig, RobustDPOConfig
from posttrain.checks import plain
from posttrain.config import parse
from posttrain.config.mixture import check_datasets
from posttrain.config.setting import identity_of, meanings, setting, told_in_card, undeclared
from posttrain.errors import ConfigError
from posttrain.hub.card import _settings
from posttrain.privacy.config import PrivacyConfig
from posttrain.run.adapter_checks import check_lora
from posttrain.run.identity import update_of
from tests.families import CONFIGS

SMALL = dict(num_generations=4, per_device_train_batch_size=4)


def make(kind, folder, **settings):
    small = SMALL if issubclass(kind, PolicyGradientConfig) else {}
    if issubclass(kind, PrivacyConfig):
        of_noise = dict(target_epsilon=8.0) if settings.get("target_epsilon", 8.0) else dict(noise_multiplier=1.0)
        small = dict(expected_batch_size=8) | of_noise
    return kind(**{"output_dir": str(folder), "report_to": [], **small, **settings})


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_own_field_declares_its_meaning(kind):
    assert undeclared(kind) == []
    assert len(meanings(kind)) > 10


def test_a_field_without_a_meaning_is_found():
    careless = dataclasses.make_dataclass("Careless", [("learning", int, 3)], bases=(RobustDPOConfig,))
    careless.__module__ = "posttrain.trainers.careless"
    assert undeclared(careless) == ["learning"]


def read_by(kind, name) -> set[str]:
    """Return the names that a property of a config reads, and the properties that it reads."""
    read, waiting = set(), [name]
    while waiting:
        known = getattr(kind, waiting.pop(), None)
        if isinstance(known, property):
            waiting += set(known.fget.__code__.co_names) - read
            read |= set(known.fget.__code__.co_names)
    return read


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_card_tells_what_a_resumed_run_must_share(kind):
    declared = meanings(kind)
    assert [name for name, meaning in declared.items() if meaning.identity and not meaning.card] == []
    for counts in {meaning.identity for meaning in declared.values() if isinstance(meaning.identity, str)}:
        owners = {name for name, meaning in declared.items() if meaning.identity == counts}
        # what it reads and the identity has by its own name is in it already
        read = {name for name in read_by(kind, counts) & declared.keys() if declared[name].identity is not True}
        assert owners and read <= owners, counts


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_card_tells_every_upstream_setting_that_a_resumed_run_must_share(kind, tmp_path):
    args = make(kind, tmp_path)
    # bf16 and fp16 are the precision
    names = update_of(args).keys() - {"bf16", "fp16"}
    for name in names:
        setattr(args if hasattr(args, name) else args.accelerator_config, name, "other")
    told = dict(_settings(SimpleNamespace(args=args, state=SimpleNamespace(global_step=1), model=None), None))
    assert {name for name in names if told.get(name) != "other"} == set()
    assert {"label_smoothing_factor", "lr_scheduler_kwargs", "adam_beta2", "even_batches"} <= names


def test_a_card_tells_the_kind_of_the_weights_where_it_is_not_fp32(tmp_path):
    run = SimpleNamespace(args=make(RobustDPOConfig, tmp_path), state=SimpleNamespace(global_step=1))
    for dtype, told in ((torch.bfloat16, "bfloat16"), (torch.float32, None)):
        run.model = SimpleNamespace(dtype=dtype)
        assert dict(_settings(run, None)).get("dtype") == told


ADAPTERS = [
    (dict(use_rslora=True), {"use_rslora": "True"}),
    (dict(use_dora=True), {"use_dora": "True"}),
    (dict(rank_pattern={"q_proj": 2}), {"rank_pattern": "{'q_proj': 2}"}),
    (dict(bias="all"), {"bias": "all"}),
    (dict(layers_to_transform=[0]), {"layers_to_transform": "0"}),
    (dict(init_lora_weights="pissa"), {"init_lora_weights": "pissa"}),
    (dict(modules_to_save=["norm", "embed_tokens"]), {"lora_modules_to_save": "embed_tokens, norm"}),
    (dict(), {}),
]


@pytest.mark.parametrize(("given", "changed"), ADAPTERS)
def test_a_card_tells_what_of_an_adapter_is_not_pefts_default(given, changed, tmp_path):
    run = SimpleNamespace(args=make(RobustDPOConfig, tmp_path), state=SimpleNamespace(global_step=1), model=None)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj"], **given)
    told = dict(set(_settings(run, adapter)) - set(_settings(run, None)))
    usual = {"lora_r": "4", "lora_alpha": "8", "lora_dropout": "0", "lora_target_modules": "k_proj, q_proj"}
    assert told == usual | changed


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
    given = dict(token_noise="msn", token_noise_length=3, token_noise_prob=0.5, token_noise_copies_special=False)
    assert told_in_card(make(NoisySFTConfig, tmp_path, **given)) == given
    given = dict(hidden_noise="noisefit", noise_layer_count=1, noise_calibration_rows=4)
    assert given.items() <= told_in_card(make(NoisySFTConfig, tmp_path, **given)).items()
    assert told_in_card(make(ALoLConfig, tmp_path, variant="nll")) == {"variant": "nll"}


def test_a_card_tells_that_a_preset_was_put_back_to_its_parents_default(tmp_path):
    assert told_in_card(make(QAEConfig, tmp_path, quantile=None)) == {"advantage": "quantile", "quantile": None}
    assert told_in_card(make(HPTConfig, tmp_path, gamma=None)) == {"gamma": None}


def test_a_null_that_a_card_tells_has_words_for_what_it_means(tmp_path):
    said, words = set(), set()
    for kind in CONFIGS:
        words |= {(kind, name) for name in kind.nulls if name in kind.__dataclass_fields__}
        # at null by default, a setting is not told
        for entry in (one for one in dataclasses.fields(kind) if one.default is not None or one.name in kind.nulls):
            with contextlib.suppress(ConfigError):
                args = make(kind, tmp_path, **{entry.name: None})
                run = SimpleNamespace(args=args, state=SimpleNamespace(global_step=1), model=None)
                told = dict(_settings(run, None))
                assert "null" not in told.values(), entry.name
                said |= {(name, value) for name, value in told.items() if value.startswith("null (")}
    assert {name for name, _ in said} == {name for _, name in words}
    assert ("quantile", "null (the baseline is the group's mean)") in said


INHERITED = [
    (PolicyGradientConfig, dict(beta=0.0), {}),
    (PolicyGradientConfig, dict(
        loss_type="dr_grpo", epsilon=0.3, temperature=0.7, num_iterations=2, scale_rewards="none",
        mask_truncated_completions=True,
    ), dict(beta=0.0)),
    (NoisySFTConfig, dict(loss_type="dft", packing=True, max_length=64, completion_only_loss=False), {}),
    (RobustDPOConfig, dict(ld_alpha=0.5, max_length=64), dict(beta=0.1)),
    (ALoLConfig, dict(max_length=1024), {}),
    (ALoLConfig, dict(
        max_length=64, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.3},
        adam_beta2=0.5, dataloader_drop_last=True, train_sampling_strategy="group_by_length",
    ), {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "always"), INHERITED)
def test_a_card_tells_inherited_settings_that_change_the_update(kind, given, always, tmp_path):
    told = make(kind, tmp_path, **given).inherited_in_card()
    small = {name: value for name, value in SMALL.items() if name == "num_generations" and "num_generations" in told}
    assert told == {**small, **always, **given}


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


def test_a_flag_that_sets_a_setting_of_a_former_name_to_false_is_answered_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match="is called `drop_zero_advantage_rows`; write `drop_zero_advantage_rows: fal"):
        parse((QAEConfig,), ["--output_dir", str(tmp_path), "--no_drop_dead_rows"])


# one row a kind of field: texts, lists, booleans, whole numbers, numbers, mappings, objects
WRONG_TYPES = [
    (RobustDPOConfig, "output_dir", [1]), (RobustDPOConfig, "optim_args", 3), (RobustDPOConfig, "report_to", {}),
    (RobustDPOConfig, "metric_for_best_model", [1]), (RobustDPOConfig, "resume_from_checkpoint", 0.5),
    (PolicyGradientConfig, "loss_type", ["dapo"]), (NoisySFTConfig, "packing", "x"), (NoisySFTConfig, "packing", None),
    (NoisySFTConfig, "save_total_limit", "x"), (NoisySFTConfig, "save_total_limit", 2.0),
    (PolicyGradientConfig, "epsilon_high", [1]), (PolicyGradientConfig, "delta", "x"), (HPTConfig, "min_p", True),
    (ALoLConfig, "overwrite", [1]), (ALoLConfig, "dry_run", "x"), (ALoLConfig, "check_gradients", {}),
    (PolicyGradientConfig, "generation_kwargs", "x"), (RobustDPOConfig, "accelerator_config", "x"),
    (RobustDPOConfig, "deepspeed", "1"), (RobustDPOConfig, "parallelism_config", "x"), (RobustDPOConfig, "fsdp", "x"),
    (RobustDPOConfig, "pad_to_multiple_of", "x"), (NoisySFTConfig, "label_names", "labels"),
    (RobustDPOConfig, "beta_prime", True), (RobustDPOConfig, "beta_prime", "1"), (ALoLConfig, "clip", "0.5"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value"), WRONG_TYPES)
def test_a_value_of_another_type_is_refused_by_its_fields_name(kind, name, value, tmp_path):
    with pytest.raises(ConfigError, match=rf"^{name} is .*; it (takes|must be) "):
        make(kind, tmp_path, **{name: value})


def test_what_upstream_takes_beside_its_annotations_is_taken(tmp_path):
    accelerator = tmp_path / "accelerator.json"
    accelerator.write_text('{"even_batches": false}')
    args = make(
        PolicyGradientConfig, tmp_path / "run", generation_kwargs='{"top_k": 3}', accelerator_config=str(accelerator),
        lr_scheduler_type=SchedulerType.CONSTANT, optim="adamw_torch", scale_rewards=False, learning_rate=1,
        pad_to_multiple_of="8", resume_from_checkpoint=False, reward_weights=(1, 2.0),
    )  # fmt: skip
    assert args.generation_kwargs == {"top_k": 3} and args.accelerator_config.even_batches is False
    # a copy gives the values as upstream resolved them
    again = dataclasses.replace(args, steps_per_generation=None, temperature=0.5)
    assert again.accelerator_config.even_batches is False and again.temperature == 0.5
    assert make(RobustDPOConfig, tmp_path, loss_type="hinge").pair_loss == "hinge"
    assert math.isinf(make(RobustDPOConfig, tmp_path, reduction="dr_dpo", beta_prime="inf").beta_prime)


@pytest.mark.parametrize("kind", CONFIGS)
def test_numpys_values_are_taken_and_become_pythons_own(kind, tmp_path):
    given = dict(
        seed=np.int64(3), max_steps=np.int8(2), learning_rate=np.float32(0.5), check_gradients=np.bool_(False),
        max_minutes=Fraction(3, 2), optim=np.str_("sgd"), label_names=np.array(["labels"]),
    )  # fmt: skip
    given |= {name: np.int32(value) for name, value in SMALL.items() if hasattr(kind, name)}
    args = make(kind, tmp_path, **given)
    assert [args.seed, args.learning_rate, args.check_gradients, args.max_minutes] == [3, 0.5, False, 1.5]
    assert {name for name, value in vars(args).items() if plain(value) is not value} == set()
    assert args.to_json_string() == make(kind, tmp_path, **{name: plain(value) for name, value in given.items()}
    ).to_json_string()  # fmt: skip
    with pytest.raises(ConfigError, match="seed is 0.5; it takes a whole number"):
        make(kind, tmp_path, seed=np.float32(0.5))


def test_numpys_values_are_taken_in_lists_adapters_and_mixtures(tmp_path):
    gate = np.array([[0, 0, 1]] + [[1, 0, 0]] * 4)
    assert make(PolicyGradientConfig, tmp_path, soft_gate=gate).soft_gate == gate.tolist()
    assert make(PolicyGradientConfig, tmp_path, reward_weights=[np.float32(0.5)]).reward_weights == [0.5]
    assert type(check_datasets([dict(path="a", fraction=np.float32(0.5))])[0].fraction) is float
    adapter = LoraConfig(r=np.int64(4), lora_alpha=np.float32(8), rank_pattern={"q_proj": np.int8(2)})
    check_lora(adapter)
    adapter.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).rank_pattern == {"q_proj": 2}


@pytest.mark.core("ALoLConfig", "HPTConfig")
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_whole_number_that_no_float_holds_is_refused_by_name(kind, tmp_path):
    # a text of more than 4300 digits is an error of Python's own
    for value in (10**400, -(10**5000), Fraction(10**400, 3)):
        for entry in (one for one in dataclasses.fields(kind) if one.init):
            with pytest.raises(ConfigError, match=f"^{entry.name} is a number beyond 1.8e308"):
                make(kind, tmp_path, **{entry.name: value})
    with pytest.raises(ConfigError, match="label_names holds a number beyond"):
        make(kind, tmp_path, label_names=[1, 10**400])


@pytest.mark.parametrize("setting", [dict(lora_alpha=10**400), dict(alpha_pattern={"q_proj": 10**400})])
def test_a_whole_number_of_an_adapter_that_no_float_holds_is_refused(setting):
    with pytest.raises(ConfigError, match="of the adapter (is|holds) a number beyond 1.8e308"):
        check_lora(LoraConfig(**setting))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_copy_of_a_config_holds_the_same_settings(kind, tmp_path):
    args = make(kind, tmp_path, learning_rate=0.5)
    same = args.to_dict()
    for copied in (copy.deepcopy(args), dataclasses.replace(args), kind(**same)):
        assert copied.to_dict() == same and vars(copied).keys() == vars(args).keys()
        assert copied.hub_token is None and getattr(copied, "pad_token", None) is None
    assert dataclasses.replace(args, learning_rate=0.25).to_dict() == same | {"learning_rate": 0.25}


def test_a_copys_generation_batch_that_does_not_follow_is_refused(tmp_path):
    args = make(PolicyGradientConfig, tmp_path)
    with pytest.raises(ConfigError, match="generation_batch_size is 4 and steps_per_generation is 1, by which it is 8"):
        dataclasses.replace(args, per_device_train_batch_size=8)
    wider = dataclasses.replace(args, per_device_train_batch_size=8, generation_batch_size=None)
    assert (wider.generation_batch_size, wider.steps_per_generation) == (8, 1)


def test_a_setting_of_ones_own_that_may_be_infinite_takes_numbers(tmp_path):
    @dataclasses.dataclass(repr=False)
    class Capped(NoisySFTConfig):
        cap: float = setting(1.0, "Cap.", identity=True, card=True, infinite=True)

    assert make(Capped, tmp_path, cap="inf").cap == math.inf
    for value in ("x", "nan", True, None):
        with pytest.raises(ConfigError, match="cap is .*; it takes a number"):
            make(Capped, tmp_path, cap=value)


def test_a_secret_of_the_wrong_type_is_not_shown(tmp_path):
    with pytest.raises(ConfigError, match="hub_token is a list; it takes a text") as refused:
        make(NoisySFTConfig, tmp_path, hub_token=["a-secret"])
    assert "a-secret" not in str(refused.value)
