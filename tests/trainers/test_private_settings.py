"""What private runs of every family ask of their settings, and what follows from their draws: batches, identity."""

import dataclasses
import functools
import math
import shutil

import pytest
from datasets import concatenate_datasets

from posttrain import (
    ALoLConfig,
    ALoLTrainer,
    DPSFTConfig,
    DPSFTTrainer,
    HPTConfig,
    HPTTrainer,
    NoisySFTConfig,
    NoisySFTTrainer,
    RobustDPOConfig,
    RobustDPOTrainer,
)
from posttrain.errors import ConfigError
from posttrain.privacy.config import PrivacyConfig
from posttrain.recipe import instructions, preferences
from posttrain.run import engines
from tests import rollouts, runs, scored, training
from tests.families import METHODS, PRIVATE
from tests.made_up import make_pairs

NOISELESS = dict(target_epsilon=math.inf, expected_batch_size=4)
# a setting, a value that no private run has, and what is then said
REFUSED = [
    ("max_grad_norm", 1.0, "max_grad_norm is 1.0, which would cut the noisy gradient"),
    ("torch_compile", True, "torch_compile is True"),
    ("auto_find_batch_size", True, "auto_find_batch_size is True, which takes steps again"),
    ("gradient_agreement", 0.97, "gradient_agreement is 0.97"),
    ("sam_rho", 0.1, "sam_rho is 0.1, which moves the weights by a gradient without noise"),
    ("refactor_every", 2, "refactor_every is 2"),
    ("dataloader_drop_last", True, "dataloader_drop_last is True"),
    ("train_sampling_strategy", "group_by_length", "train_sampling_strategy is group_by_length"),
    ("save_strategy", "best", "save_strategy is best, which keeps weights by an evaluation"),
    ("lr_scheduler_type", "reduce_lr_on_plateau", "lr_scheduler_type is reduce_lr_on_plateau, which follows losses"),
    ("optim", "adalomo", "optim is adalomo, which updates weights inside the backward"),
    ("optim", "galore_adamw_layerwise", "optim is galore_adamw_layerwise, which updates weights inside"),
]
WITH_EVALUATION = {"save_strategy", "lr_scheduler_type"}


def settled(method: str, output_dir, **settings):
    """Make a private config of a method, as its trainer does before anything loads."""
    common = runs.SETTINGS | dict(output_dir=str(output_dir))
    del common["max_grad_norm"]
    if method == "dp_sft":
        return DPSFTConfig(**common | NOISELESS | settings)
    # an optimizer whose package is not there would be refused for that, and the agreement of a single micro-batch
    optim = settings.pop("optim", "sgd")
    args = RobustDPOConfig(**common | dict(gradient_accumulation_steps=2) | settings)
    args.optim = optim
    return args.as_private(PrivacyConfig(**NOISELESS))


@pytest.mark.parametrize("method", ["dp_sft", "robust_dpo"])
@pytest.mark.parametrize(("name", "value", "said"), REFUSED)
def test_what_one_private_method_refuses_the_other_does_as_well(method, name, value, said, tmp_path):
    assert settled(method, tmp_path).privacy is not None
    evaluated = dict(eval_strategy="steps", eval_steps=1, metric_for_best_model="loss")
    with pytest.raises(ConfigError, match=said):
        settled(method, tmp_path, **{name: value} | (evaluated if name in WITH_EVALUATION else {}))


@pytest.mark.parametrize("method", ["dp_sft", "robust_dpo"])
@pytest.mark.parametrize(
    ("kind", "engine"), [("zero3", "DeepSpeed ZeRO"), ("zero2", "DeepSpeed ZeRO"), ("fsdp2", "FSDP")]
)
def test_engines_that_reduce_gradients_before_they_are_clipped_are_refused(method, kind, engine, tmp_path):
    if method == "dp_sft":
        made = functools.partial(settled, method, tmp_path)
    else:
        # built beforehand: of a launch that is there the config would ask the world size
        args = RobustDPOConfig(**{name: value for name, value in runs.SETTINGS.items() if name != "max_grad_norm"})
        made = functools.partial(args.as_private, PrivacyConfig(**NOISELESS))
    with engines.supposed("ddp"):
        made()
    with engines.supposed(kind), pytest.raises(ConfigError, match=f"launched under {engine}, which reduces gradients"):
        made()


def test_each_method_refuses_what_is_its_own_beside_the_common_table(tmp_path):
    own = {name for kind in (DPSFTConfig, RobustDPOConfig) for name, *_ in kind.not_apart}
    assert own == {"packing", "padding_free", "loss_type", "reduction", "prefix_sharing"}
    for method, given, said in (
        ("dp_sft", dict(packing=True), "packing is True, which puts several rows into one sequence"),
        ("dp_sft", dict(loss_type="dft"), "loss_type is dft"),
        ("robust_dpo", dict(reduction="dr_dpo"), "reduction is dr_dpo, which weighs each pair by the others"),
        ("robust_dpo", dict(prefix_sharing="always"), "prefix_sharing is always, which packs pairs"),
    ):
        with pytest.raises(ConfigError, match=said):
            settled(method, tmp_path, **given)
    # the same, where nothing is promised
    assert RobustDPOConfig(str(tmp_path), reduction="dr_dpo", prefix_sharing="always", max_grad_norm=1.0)


COUPLED = {
    "a_lol": (ALoLTrainer, ALoLConfig, {}, "with what weight, follows from other rows as well"),
    "hpt": (
        HPTTrainer, HPTConfig, dict(num_generations=4, per_device_train_batch_size=4),
        "a rollout's advantage is by the others of its group",
    ),
    "noisy_sft": (NoisySFTTrainer, NoisySFTConfig, {}, "which DPSFTTrainer and RobustDPOTrainer have"),
    "dp_sft": (DPSFTTrainer, DPSFTConfig, NOISELESS, "its private settings are fields of DPSFTConfig"),
}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_trainers_that_are_never_private_say_why(name, tmp_path):
    trainer, config, given, said = COUPLED[name]
    args = config(str(tmp_path / "run"), report_to=[], **given)
    rows = dict(reward_funcs=rollouts.success) if name == "hpt" else {}
    with pytest.raises(ConfigError, match=f"privacy is given to {trainer.__name__}; .*{said}"):
        trainer("no-such-model", args=args, train_dataset=[], privacy=PrivacyConfig(**NOISELESS), **rows)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("privacy", [8, "private", dict(target_epsilon=8), math.nan, [], True])
def test_what_is_no_privacy_config_is_refused_by_its_type(privacy, tmp_path):
    args = RobustDPOConfig(str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=rf"privacy is a {type(privacy).__name__}; it must be a PrivacyConfig"):
        RobustDPOTrainer("no-such-model", args=args, train_dataset=make_pairs(4), privacy=privacy)


def test_a_config_is_no_privacy_and_a_privacy_needs_a_config(tmp_path):
    args, private = RobustDPOConfig(str(tmp_path)), DPSFTConfig(str(tmp_path), **NOISELESS)
    with pytest.raises(ConfigError, match="privacy is a DPSFTConfig; it must be a PrivacyConfig"):
        RobustDPOTrainer("no-such-model", args=args, train_dataset=make_pairs(4), privacy=private)
    with pytest.raises(ConfigError, match="args is a NoneType beside privacy; it must be a RobustDPOConfig"):
        RobustDPOTrainer("no-such-model", train_dataset=make_pairs(4), privacy=PrivacyConfig(**NOISELESS))


def of_pairs(folder, args, pairs=None, **privacy):
    private = PrivacyConfig(**NOISELESS | privacy)
    pairs = make_pairs(8) if pairs is None else pairs
    return RobustDPOTrainer(folder, args=args, train_dataset=pairs, peft_config=runs.lora(), privacy=private)


def of_rows(folder, args, rows=None):
    rows = scored.make_scored(8).remove_columns("reward") if rows is None else rows
    return DPSFTTrainer(folder, args=args, train_dataset=rows, peft_config=runs.lora())


def config_of(method: str, output_dir, **settings):
    settings = runs.SETTINGS | dict(output_dir=str(output_dir), per_device_train_batch_size=2) | settings
    del settings["max_grad_norm"]
    return DPSFTConfig(**settings | NOISELESS) if method == "dp_sft" else RobustDPOConfig(**settings, beta=0.5)


@pytest.mark.core("robust_dpo")
@pytest.mark.parametrize("method", ["dp_sft", "robust_dpo"])
def test_a_trainers_plan_leaves_the_callers_config_as_it_was(method, tiny_folder, tmp_path):
    args, build = config_of(method, tmp_path / "a"), of_rows if method == "dp_sft" else of_pairs
    before = args.to_dict()
    trainer = build(tiny_folder, args)
    assert trainer.args.gradient_accumulation_steps == 4 and args.to_dict() == before
    # upstream would wait for the device after each micro-batch, for losses that are numbers
    assert not trainer.args.logging_nan_inf_filter and args.logging_nan_inf_filter
    # a copy of it has no number of micro-batches that anybody asked for, in one way or the other
    of_dict = type(args)(**before | dict(per_device_train_batch_size=4))
    for copied in (dataclasses.replace(args, per_device_train_batch_size=4), of_dict):
        assert build(tiny_folder, copied).args.gradient_accumulation_steps == 2
    if method == "robust_dpo":
        assert (args.privacy, args.max_grad_norm, args.prefix_sharing) == (None, 1.0, "auto")
        # and of one that was made private already, what it says counts
        again = RobustDPOTrainer(tiny_folder, None, trainer.args, None, make_pairs(8), peft_config=runs.lora())
        assert again.privacy is trainer.privacy and again._private is not None
        plain = RobustDPOTrainer(tiny_folder, args=args, train_dataset=make_pairs(8), peft_config=runs.lora())
        assert plain.args is args and plain._private is None


@pytest.mark.parametrize("kind", [RobustDPOConfig, DPSFTConfig, NoisySFTConfig])
def test_of_a_copied_config_what_is_at_its_default_counts_as_left_out(kind, tmp_path):
    private = NOISELESS if kind is DPSFTConfig else {}
    args = kind(str(tmp_path), learning_rate=0.25, gradient_accumulation_steps=1, **private)
    assert {"learning_rate", "gradient_accumulation_steps"} <= args._written
    copied = dataclasses.replace(args, weight_decay=0.5)
    assert {"learning_rate", "weight_decay"} <= copied._written
    assert not {"gradient_accumulation_steps", "max_steps", "seed"} & copied._written
    # an integer in the place of a float, or true for 1, is no default
    assert {"seed", "weight_decay"} <= dataclasses.replace(args, seed=7, weight_decay=0)._written


def overlong(rows, count: int):
    """Put `count` rows before others whose prompt alone has more than 64 tokens."""
    long = rows.select([0] * count).map(lambda row: {"prompt": [{"role": "user", "content": "cat " * 75}]})
    return concatenate_datasets([long, rows])


@pytest.mark.parametrize("method", ["robust_dpo", pytest.param("dp_sft", marks=pytest.mark.slow)])
def test_a_run_whose_rows_are_fewer_than_were_given_goes_on_in_its_folder(method, tiny_folder, tmp_path):
    """The identity, asked for before the run begins, is of the rows that are trained on and the batches that follow."""
    rows = make_pairs(8) if method == "robust_dpo" else scored.make_scored(8).remove_columns("reward")
    rows, build = overlong(rows, 3), of_pairs if method == "robust_dpo" else of_rows
    given = dict(max_length=64, save_strategy="steps", save_steps=1)
    first = build(tiny_folder, config_of(method, tmp_path / "run", **given), rows)
    assert (first._plan.units, first.args.gradient_accumulation_steps) == (8, 4)
    first.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    again = build(tiny_folder, config_of(method, tmp_path / "run", **given), rows)
    again.train(resume_from_checkpoint="auto")
    told = again.promise()
    assert again.state.global_step == 2 and (told.steps, told.thrown_away, told.units) == (2, 1, 8)


def test_rows_whose_tokens_come_with_the_model_are_planned_once_they_are_there(tiny_folder, tmp_path, tokenizer):
    template = tmp_path / "chat.jinja"
    template.write_text(tokenizer.chat_template)
    rows = scored.make_scored(8).remove_columns("reward")
    given = dict(chat_template_path=str(template), save_strategy="steps", save_steps=1)
    told = instructions.describe(tiny_folder, config_of("dp_sft", tmp_path / "run", **given), rows, runs.lora())
    assert "known once the model is loaded" in told["most rows per step"]
    first = of_rows(tiny_folder, config_of("dp_sft", tmp_path / "run", **given), rows)
    assert (first._plan.units, first.args.gradient_accumulation_steps) == (8, 4)
    assert len(first.get_train_dataloader()) == 2 * 4
    first.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    again = of_rows(tiny_folder, config_of("dp_sft", tmp_path / "run", **given), rows)
    again.train(resume_from_checkpoint="auto")
    assert (again.promise().steps, again.promise().thrown_away) == (2, 1)


def test_a_run_that_is_not_private_has_nothing_of_it(tiny_folder, tmp_path):
    trainer = training.build(tiny_folder, tmp_path, max_steps=1)
    assert not PRIVATE & trainer._identity().keys() and "privacy_units" not in trainer._identity()
    assert trainer.promise() is None and trainer.args.privacy is None
    told = METHODS["robust_dpo"].describe(tiny_folder, tmp_path / "b")
    assert not {"units of privacy", "epsilon", "most pairs per step"} & told.keys()


def test_a_dry_run_of_pairs_tells_what_the_trainer_plans(tiny_folder, tmp_path):
    pairs = overlong(make_pairs(12), 3).add_column("person", [f"p{row % 5}" for row in range(15)])
    privacy = PrivacyConfig(
        noise_multiplier=1.0, target_delta=0.01, expected_batch_size=2, privacy_unit_column="person", rows_per_unit=2
    )
    given = dict(max_length=64, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4)
    args = config_of("robust_dpo", tmp_path / "run", **given)
    told = preferences.describe(tiny_folder, args, pairs, runs.lora(), privacy=privacy)
    trainer = RobustDPOTrainer(tiny_folder, args=args, train_dataset=pairs, peft_config=runs.lora(), privacy=privacy)
    plan = trainer._plan
    # of the 12 pairs that are left 3 people have 2 and 2 have 3, of which a step takes 2
    assert (plan.units, plan.steps, plan.cap, told["tokens per step"] > 0) == (5, 6, 5, True)
    assert told["units of privacy"] == 5 and told["training pairs"] == 12 and told["steps"] == 6
    assert told["noise_multiplier"] == 1.0 and told["epsilon"] == pytest.approx(plan.epsilon, abs=1e-6)
    assert told["most pairs per step"] == 4 * trainer.args.gradient_accumulation_steps == 4 * 3
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


MISTAKES = [
    (dict(), dict(reduction="dr_dpo"), "reduction is dr_dpo"),
    (dict(privacy_unit_column="person"), dict(), "train_dataset has no column person, which privacy_unit_column names"),
    (dict(expected_batch_size=9), dict(), "expected_batch_size is 9, and the training data has 8 units"),
    (dict(target_epsilon=8.0, target_delta=0.2), dict(), "target_delta is 0.2, and the training data has 8 units"),
    (dict(), dict(gradient_accumulation_steps=2), "gradient_accumulation_steps is 2, and a step of"),
    (dict(), dict(peft=None), "there is no LoRA to train"),
]


@pytest.mark.parametrize(("privacy", "settings", "said"), MISTAKES)
def test_a_dry_run_of_pairs_refuses_what_the_trainer_refuses(privacy, settings, said, tiny_folder, tmp_path):
    found, settings = [], dict(settings)
    peft = settings.pop("peft", runs.lora())
    private = PrivacyConfig(**NOISELESS | privacy)
    for call in (
        lambda args: preferences.describe(tiny_folder, args, make_pairs(8), peft, privacy=private),
        lambda args: RobustDPOTrainer(
            tiny_folder, args=args, train_dataset=make_pairs(8), peft_config=peft, privacy=private
        ),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            call(config_of("robust_dpo", tmp_path / "run", **settings))
        found.append(str(refused.value))
    assert found[0] == found[1] and not (tmp_path / "run").exists()
