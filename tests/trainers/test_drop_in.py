"""TRL's own settings in the place of ours: what they mean is kept, and said once."""

import copy
import dataclasses
from dataclasses import dataclass

import pytest
import torch
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig

from posttrain import (
    ALoLConfig,
    ALoLTrainer,
    HPTConfig,
    PolicyGradientConfig,
    PolicyGradientTrainer,
    QAEConfig,
    RobustDPOConfig,
    RobustDPOTrainer,
)
from posttrain.errors import ConfigError
from posttrain.run.upstream_configs import as_own
from tests.conftest import make_pairs
from tests.rollouts import prompts
from tests.scored import make_scored
from tests.training import distance, lora, settings, trainable


def upstream(kind, folder, **overrides):
    return kind(**dict(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none") | overrides)


def run(trainer_class, folder, args, **given):
    trainer = trainer_class(folder, args=args, **given)
    before = trainable(trainer.model)
    trainer.train()
    return {name: value - before[name] for name, value in trainable(trainer.model).items()}, trainer


def parity(completion_ids, **columns) -> list[float]:
    return [float(ids[0] % 2) for ids in completion_ids]


@pytest.mark.slow
def test_swapping_the_class_alone_changes_nothing(tiny_folder, tmp_path, logged):
    given = dict(train_dataset=make_pairs(16), peft_config=lora())
    theirs, _ = run(DPOTrainer, tiny_folder, DPOConfig(**settings(tmp_path / "a", use_cpu=True, bf16=False)), **given)
    logged.set_level("INFO", "posttrain")
    args = DPOConfig(**settings(tmp_path / "b", use_cpu=True, bf16=False))
    ours, trainer = run(RobustDPOTrainer, tiny_folder, args, **given)
    assert distance(ours, theirs) < 1e-5
    assert type(trainer.args) is RobustDPOConfig and type(args) is DPOConfig
    line = "args: the DPOConfig is read as a RobustDPOConfig, every value kept, with pair_loss: dpo, flip_rate: 0.0"
    assert logged.text.count("is read as") == 1 and line in logged.text


def test_the_neutral_trainer_is_bit_equal_with_trls_own_settings(tiny_folder, tmp_path):
    """Padded as TRL pads: prefix sharing alone changes the order of sums."""
    given = dict(train_dataset=make_pairs(16), peft_config=lora())
    theirs, _ = run(DPOTrainer, tiny_folder, DPOConfig(**settings(tmp_path / "a", use_cpu=True, bf16=False)), **given)
    args = as_own(DPOConfig(**settings(tmp_path / "b", use_cpu=True, bf16=False)), RobustDPOConfig)
    args.prefix_sharing = "never"
    ours, _ = run(RobustDPOTrainer, tiny_folder, args, **given)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("kind", "own", "overrides"),
    [
        (DPOConfig, RobustDPOConfig, dict(bf16=True, lr_scheduler_type="cosine", loss_type="ipo", max_length=77)),
        (
            DPOConfig,
            RobustDPOConfig,
            dict(optim="sgd", eval_strategy="steps", logging_steps=7, report_to="none"),
        ),
        (DPOConfig, RobustDPOConfig, dict(gradient_checkpointing=False, hub_token="hf_secretsecret", warmup_steps=0.1)),
        (
            DPOConfig,
            RobustDPOConfig,
            dict(accelerator_config={"split_batches": True}, model_init_kwargs={"dtype": "auto"}),
        ),
        (GRPOConfig, PolicyGradientConfig, dict(generation_batch_size=16, scale_rewards=False, beta=0.04)),
        (GRPOConfig, QAEConfig, dict(num_generations=4, epsilon_high=0.5)),
        (GRPOConfig, HPTConfig, dict(steps_per_generation=2, loss_type="grpo", learning_rate=3e-6)),
        (SFTConfig, ALoLConfig, dict(max_length=None, assistant_only_loss=False, dataloader_num_workers=0)),
    ],
)
def test_every_value_is_kept_as_trl_resolved_it(tmp_path, kind, own, overrides):
    args = upstream(kind, tmp_path, **overrides)
    read = as_own(args, own)
    assert type(read) is own
    for entry in dataclasses.fields(kind):
        # a CPU has no memory to pin
        if entry.name != "dataloader_pin_memory":
            assert getattr(read, entry.name) == getattr(args, entry.name), entry.name
            assert type(getattr(read, entry.name)) is type(getattr(args, entry.name)), entry.name
    assert read.device == args.device and read.world_size == args.world_size
    for entry in dataclasses.fields(own):
        assert hasattr(read, entry.name)
    assert copy.deepcopy(read).to_dict() == read.to_dict()


def test_the_methods_own_settings_are_at_the_defaults_of_their_class(tmp_path):
    qae = as_own(upstream(GRPOConfig, tmp_path), QAEConfig)
    assert (qae.advantage, qae.quantile, qae.epsilon_high, qae.num_generations) == ("quantile", 0.4, None, 8)
    hpt = as_own(upstream(GRPOConfig, tmp_path), HPTConfig)
    assert (hpt.gamma, hpt.loss_type, hpt.learning_rate) == (0.0, "dapo", 1e-6)
    plain = as_own(upstream(GRPOConfig, tmp_path), PolicyGradientConfig)
    assert (plain.advantage, plain.quantile, plain.gamma) == ("group_mean", None, None)


def test_a_subclass_of_trls_config_keeps_its_own_fields(tmp_path):
    @dataclass
    class Mine(DPOConfig):
        colour: str = "red"

    read = as_own(upstream(Mine, tmp_path, colour="blue", beta=0.3), RobustDPOConfig)
    assert (read.colour, read.beta, read.pair_loss) == ("blue", 0.3, "dpo")


def test_plain_training_arguments_are_read_where_trl_reads_them(tiny_folder, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=3e-4, hub_token="hf_secretsecret")
    read = as_own(args, ALoLConfig)
    assert (read.learning_rate, read.hub_token, read.variant) == (3e-4, "hf_secretsecret", "a_lol")
    with pytest.raises(TypeError, match="args is a TrainingArguments; it must be a posttrain.RobustDPOConfig, or the"):
        RobustDPOTrainer(tiny_folder, args=args, train_dataset=make_pairs(4))


@pytest.mark.parametrize(
    ("make", "own"),
    [
        (lambda folder: upstream(DPOConfig, folder), QAEConfig),
        (lambda folder: upstream(GRPOConfig, folder), RobustDPOConfig),
        (lambda folder: QAEConfig(str(folder), num_generations=4, per_device_train_batch_size=4), HPTConfig),
        (lambda folder: {"output_dir": str(folder)}, ALoLConfig),
    ],
)
def test_settings_of_another_trainer_are_refused(tmp_path, make, own):
    with pytest.raises(TypeError, match=f"it must be a posttrain.{own.__name__}, or the trl."):
        as_own(make(tmp_path), own)


def test_grpo_trains_as_trls_with_its_own_settings(tiny_folder, tmp_path):
    given = dict(reward_funcs=parity, train_dataset=prompts([0] * 8, demonstrations=False), peft_config=lora())
    fields = dict(max_completion_length=6, num_generations=4, per_device_train_batch_size=8, max_steps=2, seed=5)
    fields |= dict(optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", save_strategy="no", temperature=5.0)
    theirs, _ = run(GRPOTrainer, tiny_folder, upstream(GRPOConfig, tmp_path / "a", **fields), **given)
    ours, _ = run(PolicyGradientTrainer, tiny_folder, upstream(GRPOConfig, tmp_path / "b", **fields), **given)
    assert any(value.any() for value in theirs.values()) and distance(ours, theirs) < 1e-4


def test_a_lol_trains_with_trls_sft_settings(tiny_folder, tmp_path):
    fields = dict(max_steps=1, per_device_train_batch_size=4, save_strategy="no", learning_rate=0.01)
    args = upstream(SFTConfig, tmp_path, **fields)
    change, trainer = run(ALoLTrainer, tiny_folder, args, train_dataset=make_scored(8), peft_config=lora())
    assert trainer.args.variant == "a_lol" and any(value.any() for value in change.values())
    with pytest.raises(ConfigError, match="packing is True, which this trainer does not use"):
        as_own(upstream(SFTConfig, tmp_path / "b", packing=True), ALoLConfig)


@pytest.mark.parametrize(
    ("fields", "pair_loss", "flip_rate"),
    [
        (dict(), "dpo", 0.0),
        (dict(loss_type="sigmoid"), "dpo", 0.0),
        (dict(loss_type=["hinge"]), "hinge", 0.0),
        (dict(loss_type="ipo", loss_weights=[1.0]), "ipo", 0.0),
        (dict(loss_type="robust", label_smoothing=0.2), "rdpo", 0.2),
        (dict(loss_type=["robust"], label_smoothing=0.0), "rdpo", 0.0),
    ],
)
def test_loss_types_are_pair_losses_in_either_config(tmp_path, fields, pair_loss, flip_rate):
    for args in (
        as_own(upstream(DPOConfig, tmp_path, **fields), RobustDPOConfig),
        RobustDPOConfig(str(tmp_path), **fields),
    ):
        assert (args.pair_loss, args.flip_rate) == (pair_loss, flip_rate)
        # as a copy by its fields is
        again = RobustDPOConfig(**{entry.name: getattr(args, entry.name) for entry in dataclasses.fields(args)})
        assert (again.pair_loss, again.flip_rate) == (pair_loss, flip_rate)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust"])
def test_each_loss_type_is_trls_own(tiny_folder, tmp_path, loss_type):
    given = dict(train_dataset=make_pairs(16), peft_config=lora())
    fields = dict(loss_type=loss_type, label_smoothing=0.2 if loss_type == "robust" else 0.0)
    fields |= dict(use_cpu=True, bf16=False)
    theirs, _ = run(DPOTrainer, tiny_folder, DPOConfig(**settings(tmp_path / "a", **fields)), **given)
    ours, _ = run(RobustDPOTrainer, tiny_folder, DPOConfig(**settings(tmp_path / "b", **fields)), **given)
    assert distance(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(loss_type="apo_zero"),
            "loss_type is apo_zero, which this trainer does not have: it has sigmoid, hinge, ipo",
        ),
        (dict(loss_type=["sigmoid", "sft"]), r"loss_type is \['sigmoid', 'sft'\] with loss_weights None"),
        (dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]), "trl.DPOTrainer sums several"),
        (dict(loss_weights=[0.5]), "trains one pair loss at weight 1"),
        (dict(label_smoothing=0.1), "label_smoothing is 0.1, which has no effect on pair_loss: dpo"),
        (dict(f_divergence_type="js_divergence"), "f_divergence_type is js_divergence"),
    ],
)
def test_losses_that_only_trl_has_are_refused_naming_it(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        as_own(upstream(DPOConfig, tmp_path, **fields), RobustDPOConfig)
    with pytest.raises(ConfigError, match=message):
        RobustDPOConfig(str(tmp_path), **fields)


@pytest.mark.parametrize(
    ("fields", "pair_loss", "flip_rate"),
    [
        (dict(flip_rate=0.2), "rdpo", 0.2),
        (dict(flip_rate=0.0), "dpo", 0.0),
        (dict(pair_loss="rdpo"), "rdpo", 0.1),
        (dict(pair_loss="cdpo"), "cdpo", 0.1),
        (dict(reduction="dr_dpo"), "dpo", 0.0),
        (dict(loss_type="robust", flip_rate=0.3), "rdpo", 0.3),
    ],
)
def test_a_flip_rate_alone_asks_for_rdpo(tmp_path, fields, pair_loss, flip_rate):
    args = RobustDPOConfig(str(tmp_path), **fields)
    assert (args.pair_loss, args.flip_rate) == (pair_loss, flip_rate)


def test_no_settings_at_all_are_the_neutral_ones(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = RobustDPOTrainer(tiny_folder, train_dataset=make_pairs(4))
    assert (trainer.args.pair_loss, trainer.args.reduction) == ("dpo", "mean")


def test_a_stream_of_prompts_that_needs_nothing_is_the_trainers_own(tiny_folder, tmp_path):
    rows = prompts([0] * 4, demonstrations=False)
    streams = {"a": rows.to_iterable_dataset(), "b": rows.to_iterable_dataset()}
    args = dict(args=upstream(GRPOConfig, tmp_path, per_device_train_batch_size=8), reward_funcs=parity)
    trainer = PolicyGradientTrainer(tiny_folder, train_dataset=rows, eval_dataset=streams["a"], **args)
    assert trainer.eval_dataset is streams["a"]
    trainer = PolicyGradientTrainer(tiny_folder, train_dataset=rows, eval_dataset=streams, **args)
    assert all(trainer.eval_dataset[name] is stream for name, stream in streams.items())
