"""One record a method: what the contract tests, and two ranks, need to know of it. A new method adds a record."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import posttrain
from posttrain import (
    ALoLConfig,
    ALoLTrainer,
    DPSFTConfig,
    DPSFTTrainer,
    NoisySFTConfig,
    NoisySFTTrainer,
    PolicyGradientConfig,
    QAEConfig,
    QAETrainer,
    RobustDPOConfig,
    RobustDPOTrainer,
)
from posttrain.adapters.allora import ALLoRAConfig
from posttrain.adapters.gift_sw import GiftSWConfig
from posttrain.mechanisms import scaled_rows
from posttrain.mechanisms.noise import draws
from posttrain.mechanisms.noise.weights import WeightNoise
from posttrain.privacy.config import PrivacyConfig
from posttrain.privacy.step import PrivateStep, RowUnits
from posttrain.recipe import instructions, preferences, scored_answers, tasks
from posttrain.recipe.scored_answers import ScoredArguments
from tests import rollouts, runs, scored, training
from tests.made_up import make_pairs


@dataclass(frozen=True)
class Method:
    """A method as the contract tests see it.

    Attributes:
        config: the class of its settings. refused: settings that it refuses, with texts in `contract/messages.txt`.
        given: what refuses them, where that is not the config.
        build: `build(folder, output_dir, **settings)` gives a trainer. `rows` is how many rows or prompts there are,
            `peft` whether an adapter is trained, `evaluated` whether the rows are evaluated on as well.
        parent: settings with which `train` trains TRL's own class.
        neutral: pairs of settings, ours and TRL's beside `parent`, that are to be equal bit for bit. The hardest first.
        step: rows that a step takes in, on one process and in one batch.
        cases: settings whose update may not depend on how a step is split. The hardest first.
        wrong: what makes the update depend on the split, by settings, or by what is done to the class.
        resumed: settings of a run that saves, the step it goes on from, and another setting with what is then said.
        shared: settings of runs that share prefixes, and end where padded ones do. The hardest first.
        tolerance: of changes in the parameters; a known wrong variant departs by more than ten times as much.
        compared: how the names of means to compare begin; all by default.
        outcome: what else two ranks are to have in common with one.
        ranks: cases of two ranks beside `cases`.
        launch: settings that each case on two ranks has beside its own.
        unsharded: names of the cases that ZeRO refuses. unspread: of those that FSDP refuses.
        ddp, sharded: names of the cases that DDP and ZeRO run in the core suite.
        generated: a case of rollouts that two ranks generate, by its name.
        plain: how one process that takes the batch whole departs from a case on two ranks.
        describe: `describe(folder, output_dir, **settings)` is the dry run of the `train` with the same arguments.
        counted: the facts of a dry run that count the rows trained on.
        unloaded: by settings, what a trainer and its dry run say when they refuse them, before a weight is loaded.
        padded: settings with which the rows of a batch are padded to one length.
        forwards: settings of a run that has other forwards than those that are backpropagated.
        recipes: by recipe, settings with which it trains `embedded:tiny` on what is at hand.
        laid_out: ways to lay rows out in steps.
        plain_lora: whether it trains a plain LoRA and no other adapter.
    """

    name: str
    config: type
    refused: Sequence[Mapping]
    build: Callable
    parent: Mapping
    neutral: Mapping[str, tuple[Mapping, Mapping]]
    step: int
    cases: Mapping[str, Mapping]
    wrong: Mapping | Callable
    resumed: tuple[Mapping, int, tuple[Mapping, str]]
    shared: Mapping[str, Mapping]
    tolerance: float = 1e-4
    compared: tuple[str, ...] | None = None
    metrics: Mapping = field(default_factory=lambda: dict(rel=1e-3, abs=1e-5))
    outcome: Callable = lambda trainer: []
    ranks: Mapping[str, Mapping] = field(default_factory=dict)
    launch: Mapping = field(default_factory=dict)
    unsharded: tuple[str, ...] = ()
    unspread: tuple[str, ...] = ()
    ddp: tuple[str, ...] = ()
    sharded: tuple[str, ...] = ()
    generated: Mapping[str, Mapping] = field(default_factory=dict)
    plain: Mapping = field(default_factory=dict)
    describe: Callable = None
    given: Callable | None = None
    counted: tuple[str, ...] = ()
    unloaded: Mapping[str, Mapping] = field(default_factory=dict)
    padded: Mapping = field(default_factory=dict)
    forwards: Mapping = field(default_factory=dict)
    recipes: Mapping[str, Mapping] = field(default_factory=dict)
    plain_lora: bool = False
    laid_out: Sequence[Mapping] = (
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=1.5),
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=1),
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, dataloader_drop_last=True),
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, dataloader_drop_last=True),
    )

    @property
    def trainer(self) -> type:
        return getattr(posttrain, self.config.__name__.removesuffix("Config") + "Trainer")

    def train(self, folder, output_dir, snapshot=runs.trainable, resume=None, **settings):
        """(change of the trainable parameters, the trainer)."""
        return runs.fit(self.build(folder, output_dir, **settings), snapshot, resume)

    def split(self, micro: int) -> dict:
        return dict(per_device_train_batch_size=micro, gradient_accumulation_steps=self.step // micro)


def _pairs(folder, output_dir, rows: int = 16, evaluated=False, people: int | None = None, **settings):
    """RobustDPOTrainer or TRL's; private with settings of `PrivacyConfig`. `people`: to whom pairs belong in turn."""
    pairs = make_pairs(rows)
    held_out = dict(held_out=pairs) if evaluated else {}
    if people is not None:
        pairs = pairs.add_column("person", [row % people for row in range(rows)])
    return training.build(folder, output_dir, pairs=pairs, **held_out | _private_apart(settings))


def _private_apart(settings: dict) -> dict:
    """The settings with those of `PrivacyConfig` as one, `privacy`, where there are any."""
    private = {name: value for name, value in settings.items() if name in PRIVATE}
    others = {name: value for name, value in settings.items() if name not in PRIVATE}
    return others | (dict(privacy=PrivacyConfig(**private)) if private else {})


def _scored(folder, output_dir, rows: int = 16, prompts=None, length=None, baseline=None, evaluated=False, **settings):
    columns = {} if baseline is None else dict(baseline=[baseline] * rows)
    answers = scored.make_scored(rows, prompts=prompts, length=length, **columns)
    return scored.build(folder, output_dir, answers, **(dict(eval_dataset=answers) if evaluated else {}) | settings)


def _rollouts(folder, output_dir, rows: int = 8, **settings):
    successes = ([1, 0, 4, 2, 0, 3, 0, 1] * rows)[:rows]
    return rollouts.build(folder, output_dir, data=rollouts.prompts(successes), **settings)


def _instructions(folder, output_dir, rows: int = 16, evaluated=False, **settings):
    answers = scored.make_scored(rows).remove_columns("reward")
    ours = dict(trainer_class=NoisySFTTrainer, config_class=NoisySFTConfig)
    ours |= dict(eval_dataset=answers) if evaluated else {}
    return scored.build(folder, output_dir, answers, **ours | settings)


def _private(
    folder, output_dir, rows: int = 8, evaluated=False, peft=True, people: int | None = None,
    trainer_class=DPSFTTrainer, config_class=DPSFTConfig, **settings,
):  # fmt: skip
    """DPSFTTrainer; by default without noise, every row in every step. `people`: to whom the rows belong in turn."""
    answers = scored.make_scored(rows).remove_columns("reward")
    held_out = answers if evaluated else None
    if people is not None:
        answers = answers.add_column("person", [row % people for row in range(rows)])
    given = dict(train_dataset=answers, eval_dataset=held_out, peft_config=_adapter(peft))
    quantized = {name: settings.pop(name) for name in ("quantization_config",) if name in settings}
    return trainer_class(folder, args=_private_settings(output_dir, **settings), **given, **quantized)


def _private_settings(output_dir, **settings) -> DPSFTConfig:
    fields = dict(learning_rate=0.5, target_epsilon=math.inf, expected_batch_size=8) | settings
    fields = scored.settings(output_dir, **fields)
    del fields["prefix_sharing"]
    if "gradient_accumulation_steps" not in settings:
        # as many micro-batches as hold any draw
        del fields["gradient_accumulation_steps"]
    return DPSFTConfig(**fields)


# the noise of three bits is so large that it tells
def _columns(**settings) -> GiftSWConfig:
    return GiftSWConfig(**dict(r=8, target_modules="all-linear", bits=3, calibration_rows=4) | settings)


def _salient(
    folder, output_dir, rows: int = 16, evaluated=False, peft=None, parent=False, pairs=False,
    trainer_class=NoisySFTTrainer, config_class=NoisySFTConfig, **settings,
):  # fmt: skip
    """NoisySFTTrainer with a GIFT-SW adapter; TRL's trainer with a LoRA of the same A; or RobustDPOTrainer."""
    scheme = {name: settings.pop(name) for name in ("noise", "bits", "metric") if name in settings}
    if pairs:
        args = RobustDPOConfig(**training.settings(output_dir, **settings))
        config = _columns(**dict(noise="gaussian") | scheme)
        return RobustDPOTrainer(folder, args=args, train_dataset=make_pairs(rows), peft_config=config)
    fields = scored.settings(output_dir, **dict(learning_rate=0.5) | settings)
    del fields["prefix_sharing"]
    answers = scored.make_scored(rows).remove_columns("reward")
    given = dict(train_dataset=answers, eval_dataset=answers if evaluated else None, peft_config=_columns(**scheme))
    if not parent:
        return trainer_class(folder, args=config_class(**fields), **given)
    calibrated = NoisySFTTrainer(folder, args=NoisySFTConfig(**fields | dict(output_dir=f"{output_dir}-A")), **given)
    matrices = {name: value for name, value in calibrated.model.named_parameters() if "lora_A" in name}
    given["peft_config"] = runs.lora(r=8, lora_alpha=8)
    trainer = SFTTrainer(folder, args=SFTConfig(**fields | runs.PARENT), **given)
    for name, value in trainer.model.named_parameters():
        if name in matrices:
            value.data.copy_(matrices[name])
            value.requires_grad_(False)
    return trainer


def _scaled(
    folder, output_dir, rows: int = 16, evaluated=False, peft=None, pairs=False, trainer_class=NoisySFTTrainer,
    config_class=NoisySFTConfig, **settings,
):  # fmt: skip
    """NoisySFTTrainer, or TRL's, with an ALLoRA adapter; or RobustDPOTrainer."""
    scheme = {name: settings.pop(name) for name in ("eta", "form") if name in settings}
    config = ALLoRAConfig(**dict(r=4, target_modules="all-linear") | scheme)
    if pairs:
        args = RobustDPOConfig(**training.settings(output_dir, **settings))
        return RobustDPOTrainer(folder, args=args, train_dataset=make_pairs(rows), peft_config=config)
    fields = scored.settings(output_dir, **dict(learning_rate=0.2, max_steps=3) | settings)
    del fields["prefix_sharing"]
    answers = scored.make_scored(rows).remove_columns("reward")
    given = dict(train_dataset=answers, eval_dataset=answers if evaluated else None, peft_config=config)
    return trainer_class(folder, args=config_class(**fields), **given)


def _adapter(peft: bool):
    return runs.lora() if peft else None


def _told_of_pairs(folder, output_dir, rows: int = 16, peft=True, **settings):
    settings = _private_apart(settings)
    privacy = settings.pop("privacy", None)
    args = RobustDPOConfig(**training.settings(output_dir, privacy is not None, **settings))
    return preferences.describe(folder, args, make_pairs(rows), _adapter(peft), privacy=privacy)


def _told_of_answers(folder, output_dir, rows: int = 16, peft=True, **settings):
    args, given = ALoLConfig(**scored.settings(output_dir, **settings)), ScoredArguments(dataset_name="a")
    return scored_answers.describe(folder, args, given, scored.make_scored(rows), _adapter(peft))


def _told_of_tasks(folder, output_dir, rows: int = 8, peft=True, **settings):
    args = PolicyGradientConfig(**rollouts.settings(output_dir, **settings))
    data = rollouts.prompts(([1, 0, 4, 2, 0, 3, 0, 1] * rows)[:rows])
    given = tasks.TaskArguments(dataset_name="a")
    return tasks.describe(folder, args, given, data, _adapter(peft), rewards=[rollouts.success])


def _told_of_instructions(folder, output_dir, rows: int = 16, peft=True, **settings):
    settings = scored.settings(output_dir, **settings)
    del settings["prefix_sharing"]
    answers = scored.make_scored(rows).remove_columns("reward")
    return instructions.describe(folder, NoisySFTConfig(**settings), answers, _adapter(peft))


def _told_of_private(folder, output_dir, rows: int = 8, peft=True, **settings):
    answers = scored.make_scored(rows).remove_columns("reward")
    return instructions.describe(folder, _private_settings(output_dir, **settings), answers, _adapter(peft))


def _told_of_columns(folder, output_dir, rows: int = 16, peft=None, **settings):
    settings = scored.settings(output_dir, **settings)
    del settings["prefix_sharing"]
    answers = scored.make_scored(rows).remove_columns("reward")
    return instructions.describe(folder, NoisySFTConfig(**settings), answers, _columns())


def _told_of_factors(folder, output_dir, rows: int = 16, peft=None, **settings):
    settings = scored.settings(output_dir, **settings)
    del settings["prefix_sharing"]
    answers = scored.make_scored(rows).remove_columns("reward")
    adapter = ALLoRAConfig(r=4, target_modules="all-linear")
    return instructions.describe(folder, NoisySFTConfig(**settings), answers, adapter)


def _clip_micro_batches(monkeypatch) -> dict:
    """The gradient of a micro-batch is clipped, and not those of its rows."""
    collect, counted = PrivateStep.collect, itertools.count()

    def of_all(self, gradients, units):
        return collect(self, gradients, RowUnits([next(counted)], torch.zeros_like(units.index)))

    monkeypatch.setattr(PrivateStep, "collect", of_all)
    return {}


def _draw_a_forward(monkeypatch) -> dict:
    """Each micro-batch draws noise of its own."""
    drawn = itertools.count()
    of_step = WeightNoise.during_step

    def during_step(self, model, step):
        return of_step(self, model, next(drawn))

    monkeypatch.setattr(WeightNoise, "during_step", during_step)
    return {}


def _factors_a_micro_batch(monkeypatch) -> dict:
    """Each micro-batch has factors of its own."""
    counted = itertools.count()
    factors = scaled_rows.scale_of
    monkeypatch.setattr(scaled_rows, "scale_of", lambda gram, B, eta: factors(gram, B, eta) / (1 + next(counted) % 28))
    return {}


def _width_for_length(monkeypatch) -> dict:
    """Noise goes by the width of the padded batch."""
    scales = draws.scales

    def flat(kind, alpha, found, size):
        widest = torch.full_like(found.lengths, int(found.place.max()) + 1)
        return scales(kind, alpha, found._replace(lengths=widest), size)

    monkeypatch.setattr(draws, "scales", flat)
    return {}


def _mean_of_means(monkeypatch) -> dict:
    """Each micro-batch counts alike, however many rows it has."""
    window = ALoLTrainer.get_batch_samples

    def forgetful(self, *args):
        batches, items = window(self, *args)
        return [{k: v for k, v in batch.items() if k != "window_rows"} for batch in batches], items

    monkeypatch.setattr(ALoLTrainer, "get_batch_samples", forgetful)
    monkeypatch.setattr(ALoLTrainer, "loss_is_scaled_for_ga", False)
    return {}


# of every method: what a trainer and its dry run say
UNLOADED = {
    "use_liger_kernel is true, which needs the package liger-kernel": dict(use_liger_kernel=True),
    "base_model_id is not set, and the base model is": dict(push_to_hub=True, hub_model_id="me/run"),
    "model_init_kwargs names 'bogus', which neither": dict(model_init_kwargs=dict(bogus=1)),
    r"router_aux_loss_coef is 0.1, and the model \(llama\) is no mixture": dict(router_aux_loss_coef=0.1),
    "eval_strategy is steps, and eval_dataset is missing": dict(eval_strategy="steps", eval_steps=1),
}
_PADDED = {"pad_token is '<nope>', which is no token of": dict(pad_token="<nope>")}
_ON_CPU = {"activation_offloading is true, and there is no accelerator": dict(activation_offloading=True)}
_OF_TEXTS = {
    **_PADDED,
    **_ON_CPU,
    "eos_token is '<nope>', which is no token of": dict(eos_token="<nope>"),
    "chat_template_path is '/nope/x', which is no folder and no .jinja": dict(chat_template_path="/nope/x"),
}
_SYNCED = "sync_ref_model is true and an adapter is trained"
_EVALUATED = dict(evaluated=True, eval_strategy="steps", eval_steps=1)
NAN, INF = float("nan"), float("inf")
OFF_POLICY = [[0, 1, 0]] * 5
DR_DPO = dict(reduction="dr_dpo", beta_prime=0.3)
RDPO = dict(pair_loss="rdpo", flip_rate=0.2)
DPO = dict(pair_loss="dpo")
PADDED = dict(prefix_sharing="never")
_SPLIT = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
# 13 rows: the second step holds 5
_SHORT = dict(rows=13)
PRIVATE = {entry.name for entry in fields(PrivacyConfig)}
# all rows are in each step, so that nothing is left to chance; a third of them is clipped
NOISELESS = dict(target_epsilon=INF, clip_norm=0.5, expected_batch_size=8)
_PROMISE = dict(target_epsilon=8.0, expected_batch_size=16)
PEOPLE = NOISELESS | dict(people=4, rows_per_unit=2, privacy_unit_column="person", expected_batch_size=4)
_PRIVATE_PAIRS = ("private", "private-people", "private-cached")

robust_dpo = Method(
    name="robust_dpo",
    config=RobustDPOConfig,
    refused=(
        dict(flip_rate=-0.1),
        dict(flip_rate=0.5),
        dict(flip_rate=NAN),
        dict(reduction="dr_dpo", beta_prime=0),
        dict(reduction="dr_dpo", beta_prime=-1),
        dict(reduction="dr_dpo", beta_prime=NAN),
        dict(pair_loss="rpdo"),
        dict(neftune_noise_alpha=5),
        dict(beta=None),
        dict(loss_type=INF),
        dict(loss_weights=INF),
        dict(num_train_epochs="x"),
        dict(max_steps=[1]),
        dict(adam_beta1="0.9"),
        dict(save_strategy=None),
        dict(beta_prime=None),
        dict(learning_rate=None),
        dict(num_train_epochs=INF),
        dict(report_to="wandbb"),
        dict(report_to=["tensorboard", "wandbb"]),
        dict(refactor_every=-1),
        dict(refactor_every=True),
        dict(refactor_every=2, optim="adafactor"),
        dict(refactor_every=2, optim="adamw_torch", refactor_second_moment="refuse"),
        dict(refactor_every=2, refactor_second_moment="drop"),
        dict(refactor_second_moment="refuse"),
    ),
    build=_pairs,
    parent=dict(trainer_class=DPOTrainer, config_class=DPOConfig, **runs.PARENT),
    neutral={
        "rdpo": (PADDED | _SPLIT | dict(pair_loss="rdpo", flip_rate=0.0), _SPLIT),
        "dr_dpo": (PADDED | _SPLIT | dict(reduction="dr_dpo", beta_prime="inf"), _SPLIT),
        "full": (PADDED | dict(pair_loss="rdpo", flip_rate=0.0, peft=False), dict(peft=False)),
        "dpo": (PADDED | _SPLIT | DPO, _SPLIT),
        "cdpo": (PADDED | _SPLIT | dict(pair_loss="cdpo", flip_rate=0.0), _SPLIT),
        "hinge": (PADDED | _SPLIT | dict(pair_loss="hinge"), _SPLIT | dict(loss_type="hinge")),
        "ipo": (PADDED | _SPLIT | dict(pair_loss="ipo"), _SPLIT | dict(loss_type="ipo")),
        "ld_alpha": (PADDED | _SPLIT | DPO | dict(ld_alpha=0.5), _SPLIT | dict(ld_alpha=0.5)),
        "cached": (
            PADDED | _SPLIT | DPO | dict(precompute_ref_log_probs=True),
            _SPLIT | dict(precompute_ref_log_probs=True),
        ),
    },
    step=8,
    cases={
        "dr_dpo": DR_DPO | _SHORT,
        "rdpo": RDPO | _SHORT,
        "dr_dpo-rescale": DR_DPO | _SHORT | dict(dr_dpo_window="rescale"),
        "dr_dpo-whole-steps": DR_DPO | dict(rows=16),
        "dpo": DPO | _SHORT,
    },
    wrong=DR_DPO | _SHORT | dict(dr_dpo_scope="micro_batch"),
    resumed=(
        DR_DPO
        | dict(max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, rows=14)
        | dict(
            optim="adamw_torch", learning_rate=1e-2, lr_scheduler_type="linear", save_strategy="steps", save_steps=2
        ),
        2,
        (dict(beta_prime=0.5), "beta_prime: 0.3 there, 0.5 here"),
    ),
    shared={
        name + ("" if peft else "-full"): case
        # full fine-tuning at the higher rate diverges, and rounding with it
        | dict(rows=20, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2, peft=peft)
        | dict(learning_rate=0.05 if peft else 0.02)
        for peft in (True, False)
        for name, case in dict(dr_dpo=DR_DPO, rdpo=RDPO, dpo=DPO).items()
    },
    ranks={
        "dpo-one-round": DPO | dict(rows=16, per_device_train_batch_size=4, gradient_accumulation_steps=1),
        "dr_dpo-cached": DR_DPO | _SHORT | dict(precompute_ref_log_probs=True),
        # at the higher rate full fine-tuning enlarges what is rounded
        "dr_dpo-full": DR_DPO | _SHORT | dict(peft=False, learning_rate=0.02),
        "dr_dpo-padded": DR_DPO | _SHORT | PADDED,
        "refactored": DPO | _SHORT | dict(refactor_every=1),
        "private": RDPO | NOISELESS | dict(rows=8),
        "private-people": DPO | PEOPLE | dict(rows=8),
        "private-cached": DPO | NOISELESS | dict(rows=8, precompute_ref_log_probs=True),
    },
    # by DeepSpeed, as tests/trainers and tests/run assert
    unsharded=("dr_dpo-rescale", "refactored", *_PRIVATE_PAIRS),
    unspread=("dr_dpo-cached", "refactored", *_PRIVATE_PAIRS),
    ddp=("dr_dpo", "dr_dpo-full"),
    sharded=("dr_dpo", "dr_dpo-full"),
    plain=PADDED | dict(precompute_ref_log_probs=False),
    describe=_told_of_pairs,
    counted=("training pairs",),
    padded=PADDED,
    forwards=_EVALUATED | DR_DPO,
    recipes={
        "robust_dpo": dict(dataset_name="generated:reverse_list?n=16", max_length=128, gradient_accumulation_steps=1),
    },
    unloaded={
        **_PADDED,
        **_ON_CPU,
        _SYNCED: dict(sync_ref_model=True),
        "sync_ref_model is true with precompute_ref_log_probs": dict(
            sync_ref_model=True, precompute_ref_log_probs=True, peft=False
        ),
    },
)

a_lol = Method(
    name="a_lol",
    config=ALoLConfig,
    refused=(
        dict(variant="a_lol_sq"),
        dict(clip=NAN),
        dict(variant="ppo"),
        dict(value="median"),
        dict(advantage_weighting="draw"),
        dict(clip=0.0),
        dict(clip=-1),
        dict(clip="0.9"),
        dict(kl_beta=0.1),
        dict(variant="a_lol_kl", kl_beta=-1.0),
        dict(value_column="v"),
        dict(reward_max=0.0),
        dict(value_folds=1),
        dict(value_targets="generations"),
        dict(value="head", variant="wbc"),
        dict(keep_negative_advantages=True, variant="wbc"),
        dict(advantage_weighting="sample", variant="nll"),
        dict(advantage_weighting="sample", variant="a_lol_kl", kl_beta=0.1),
        dict(advantage_weighting="sample", keep_negative_advantages=True),
        dict(advantage_weighting="sample", train_sampling_strategy="group_by_length"),
        dict(packing=True),
        dict(packing=True, variant="wbc"),
        dict(padding_free=True),
        dict(loss_type="dft"),
        dict(completion_only_loss=False),
        dict(label_smoothing_factor=0.1),
        dict(prefix_sharing="on"),
        dict(value="head", value_prompts=1, value_folds=2),
    ),
    build=_scored,
    parent=dict(trainer_class=SFTTrainer, config_class=SFTConfig, **runs.PARENT),
    # 7 bytes and the end of the turn: 8 tokens, a power of two, so that the scaling is exact
    neutral={
        "nll-full": (
            _SPLIT | dict(variant="nll", length=7, peft=False),
            _SPLIT | dict(length=7, learning_rate=0.08, peft=False),
        ),
    },
    step=8,
    # values below all rewards: every row is kept
    cases={
        "a_lol-seq": dict(rows=13, baseline=-0.1, value="column", learning_rate=0.003, variant="a_lol_seq"),
        "a_lol": dict(rows=13, baseline=-0.1, value="column", learning_rate=0.003, variant="a_lol"),
        "a_lol-sampled-and-weighed": dict(
            rows=13,
            baseline=-0.1,
            value="column",
            learning_rate=0.003,
            variant="a_lol",
            advantage_weighting="sample_and_weight",
        ),
        "a_lol-whole-steps": dict(rows=16, baseline=-0.1, value="column", learning_rate=0.003, variant="a_lol"),
    },  # fmt: skip
    wrong=_mean_of_means,
    resumed=(
        # an epoch is 4 steps of 2, and the run goes on within the second
        dict(advantage_weighting="sample", per_device_train_batch_size=2, learning_rate=1e-3, optim="adamw_torch")
        | dict(max_steps=7, value="column", lr_scheduler_type="linear", rows=8, baseline=-0.1)
        | dict(save_strategy="steps", save_steps=5),
        5,
        (dict(clip=0.5), "clip: 0.9 there, 0.5 here"),
    ),
    # four prompts of four answers each
    shared={
        variant: dict(variant=variant, prompts=4, max_steps=4, **_SPLIT)
        for variant in ("a_lol_seq", "a_lol", "wbc", "r_gold")
    },
    outcome=lambda trainer: trainer.train_dataset["advantage"][:],
    # all but a few of the answers are kept; a step's 8 lie across ranks and micro-batches
    ranks={
        name: dict(rows=20, prompts=10, learning_rate=0.003) | case
        for name, case in {
            "a_lol-kept": dict(variant="a_lol"),
            "a_lol-seq-full": dict(variant="a_lol_seq", peft=False),
            "a_lol-sampled": dict(variant="a_lol", advantage_weighting="sample"),
            "a_lol-head": dict(variant="a_lol", value="head", value_folds=2, value_learning_rate=0.01),
            "ref-free": dict(variant="a_lol_ref_free"),
        }.items()
    },
    # all that forward the starting model
    unspread=(
        "a_lol-seq",
        "a_lol",
        "a_lol-sampled-and-weighed",
        "a_lol-whole-steps",
        "a_lol-kept",
        "a_lol-seq-full",
        "a_lol-sampled",
        "a_lol-head",
    ),
    ddp=("a_lol-sampled-and-weighed",),
    sharded=("a_lol-head",),
    describe=_told_of_answers,
    counted=("of them with a gradient",),
    padded=PADDED,
    forwards=_EVALUATED,
    recipes={"a_lol": dict(dataset_name="generated:reverse_list?n=16", max_length=128, gradient_accumulation_steps=1)},
    unloaded=_OF_TEXTS,
)

_OFF = dict(prefix_sharing="never", drop_zero_advantage_rows=False)
_TASKS = dict(
    dataset_name="generated:arithmetic?n=16&operands=2-2&digits=1-1", reward_funcs="tests.rollouts:odd",
    allow_code="tests.rollouts", use_vllm="false", num_generations=4, max_completion_length=8,
    per_device_train_batch_size=4, gradient_accumulation_steps=1, steps_per_generation=1,
)  # fmt: skip
_DR_GRPO = dict(loss_type="dr_grpo", scale_rewards="none")
policy_gradient = Method(
    name="policy_gradient",
    config=PolicyGradientConfig,
    refused=(
        dict(gamma=0.0, demonstration_loss="luffy"),
        dict(num_generations=None),
        dict(num_generations=INF),
        dict(num_generations=3, per_device_train_batch_size=4),
        dict(demonstration_loss="srft"),
        dict(soft_gate=[[1, 0, 1]] * 5, demonstration_loss="luffy"),
        dict(soft_gate=OFF_POLICY),
        dict(soft_gate=[[0, 0, "a"]] * 5),
        dict(soft_gate=[[0, 0, None]] * 5),
        dict(soft_gate=[[0, 0, INF]] * 5),
        dict(soft_gate="x"),
        dict(success_threshold=NAN),
        dict(success_threshold="a"),
        dict(sft_coef=INF),
        dict(beta=-1.0),
        dict(advantage=None),
        dict(advantage="quantile"),
        dict(estimator="ppo"),
        dict(estimator={"preset": "grpo", "clip": 1}),
        dict(estimator={"preset": "grpo", "stability": "ppo"}),
        dict(estimator="dapo", loss_type="grpo"),
        dict(estimator="grpo", epsilon=0.3),
    ),
    build=_rollouts,
    parent=dict(trainer_class=GRPOTrainer, config_class=GRPOConfig),
    neutral={
        "two-iterations": (_OFF | dict(num_iterations=2), dict(num_iterations=2)),
        "quantile-null": (
            _OFF | dict(trainer_class=QAETrainer, config_class=QAEConfig, quantile=None, epsilon_high=0.28),
            dict(epsilon_high=0.28),
        ),
        "default": (_OFF, {}),
        "kl": (_OFF | dict(beta=0.05), dict(beta=0.05)),
        "gamma-null": (_OFF | _DR_GRPO | dict(gamma=None), _DR_GRPO),
    },
    step=32,
    cases={
        "hpt": dict(preset="hpt", max_steps=1),
        "dapo": dict(loss_type="dapo", epsilon_high=0.28),
    },
    wrong=dict(loss_type="bnpo"),
    resumed=(
        # four optimiser steps a generation; a save is due after each third step
        dict(made_up=False, reward=rollouts.odd, max_steps=12, save_strategy="steps", save_steps=3, optim="adamw_torch")
        | dict(learning_rate=1e-2, gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2)
        | dict(shuffle_dataset=True),
        4,
        (dict(epsilon=0.3), "epsilon: 0.2 there, 0.3 here"),
    ),
    shared={
        "gspo": dict(num_iterations=2, max_steps=4, loss_type="grpo", importance_sampling_level="sequence"),
        "dapo": dict(num_iterations=2, max_steps=4, loss_type="dapo", epsilon_high=0.28),
        "grpo": dict(num_iterations=2, max_steps=4, loss_type="grpo"),
    },
    compared=("rows/kept_share", "entropy", "clip_ratio/region_mean", "clip_ratio/low_min"),
    metrics=dict(rel=1e-3, abs=1e-5),
    outcome=lambda trainer: list(trainer._logs["advantages"])[-32:],
    # 32 made-up rollouts a step, eight groups of four that lie across ranks and micro-batches
    ranks={
        "grpo": dict(),
        "qae": dict(preset="qae"),
        "qae-all-rows": dict(preset="qae", drop_zero_advantage_rows=False, prefix_sharing="never"),
        "hpt-full": dict(preset="hpt", peft=False),
    },
    # use_cpu would have accelerate look past DeepSpeed
    launch=dict(use_cpu=None),
    generated={"generated": dict(preset="hpt", made_up=False, max_completion_length=8, max_steps=1)},
    describe=_told_of_tasks,
    counted=("training tasks",),
    padded=_OFF,
    forwards=dict(beta=0.1),
    recipes={"qae": _TASKS, "hpt": _TASKS | dict(max_completion_length=32)},
    unloaded={
        _SYNCED: dict(sync_ref_model=True, beta=0.1),
        "sync_ref_model is true and beta is 0": dict(sync_ref_model=True, peft=False),
        "success_reward is 'nobody'; it must be one of success": dict(success_reward="nobody"),
        "use_vllm needs the package vllm": dict(use_vllm=True),
        "reward_weights has 2 weights for 1 reward functions": dict(reward_weights=[0.5, 0.5]),
    },
    laid_out=(
        dict(rows=5, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=2),
        dict(rows=5, per_device_train_batch_size=4, gradient_accumulation_steps=1),
        dict(rows=5, per_device_train_batch_size=4, gradient_accumulation_steps=1, num_generations=2, num_iterations=2),
    ),
)

NOISEFIT = dict(hidden_noise="noisefit", noise_layers=[0, 1], hidden_noise_scale=0.3, consistency_weight=5.0)
# of embeddings of 64 channels, about 0.02 each
SYMNOISE = dict(embedding_noise="symnoise", noise_alpha=0.8)
MSN = dict(token_noise="msn", token_noise_length=3)
NEFTUNE = dict(embedding_noise="neftune", noise_alpha=1.5)
noisy_sft = Method(
    name="noisy_sft",
    config=NoisySFTConfig,
    refused=(
        dict(neftune_noise_alpha=5.0),
        dict(embedding_noise="bernoulli"),
        dict(embedding_noise="uniform", length_mode="tensor"),
        dict(embedding_noise="neftune", length_mode="row"),
        dict(embedding_noise="symnoise", noise_alpha=math.nan),
        dict(hidden_noise="dropout"),
        NOISEFIT | dict(noise_layers="snr"),
        NOISEFIT | dict(noise_layers=[-1, 2]),
        NOISEFIT | dict(noise_layers=[]),
        NOISEFIT | dict(noise_layers=[1.5]),
        NOISEFIT | dict(noise_layer_count=0),
        NOISEFIT | dict(hidden_noise_scale=-0.1),
        NOISEFIT | dict(ce_weight=1.5),
        NOISEFIT | dict(consistency_temperature=0),
        NOISEFIT | dict(consistency_mode="both"),
        NOISEFIT | dict(hidden_noise_base="std"),
        dict(hidden_noise="noisefit", noise_layers="auto", hidden_noise_base="legacy"),
        dict(hidden_noise="noisefit", noise_layers="auto", hidden_noise_scale=0.5),
        dict(hidden_noise="noisefit", noise_layers=[0], noise_layer_count=2),
        dict(hidden_noise="noisefit", consistency_mode="ce_noisy", consistency_temperature=2.0),
        NOISEFIT | dict(consistency_temperature=1e30),
        dict(noise_layers=[1]),
        dict(token_noise_prob=0.5),
        dict(accepted_tokens_length=8),
        NOISEFIT | dict(loss_type="dft"),
        NOISEFIT | dict(label_smoothing_factor=0.1),
        NOISEFIT | dict(embedding_noise="neftune"),
        NOISEFIT | dict(packing=True, packing_strategy="wrapped"),
        MSN | dict(token_noise="masked"),
        MSN | dict(token_noise_length=-1),
        MSN | dict(token_noise_prob=1.5),
        MSN | dict(accepted_tokens_rows=-1),
        MSN | NEFTUNE,
        MSN | dict(packing=True, packing_strategy="bfd_split"),
        MSN | dict(torch_compile=True),
        dict(embedding_noise="neftune", noise_alpha=-1.0),
        dict(noise_alpha=7.0),
        NEFTUNE | dict(packing=True, packing_strategy="wrapped"),
        NEFTUNE | dict(torch_compile=True),
        NEFTUNE | dict(gradient_checkpointing_kwargs={"preserve_rng_state": False}),
        dict(padding_free=True, max_length=64),
        dict(packing=True, max_length=None),
        dict(optim="pytorch_optimizer:sam"),
        dict(optim="pytorch_optimizer:sgd_sai"),
        dict(optim="my_optimizers.Mine"),
        dict(optim="pytorch_optimizer:ano", adam_beta1=0.8),
        dict(optim="pytorch_optimizer:ademamix", optim_args="alph=1"),
        dict(optim="pytorch_optimizer:ademamix", optim_args="betas=0.9"),
        dict(optim="pytorch_optimizer:adashift"),
        dict(optim="sgd", optim_args="momentum=abc"),
        dict(optim="sgd", optim_args="nesterov=true"),
        dict(optim="adamw_torch", optim_target_modules="all-linear"),
        dict(gradient_agreement=3.0),
        dict(gradient_agreement=0.97, gradient_accumulation_steps=1),
        dict(sam_rho=-0.1),
        dict(sam_mask="fisher"),
        dict(sam_rho=0.1, sam_mask_share=0.5),
        dict(sam_rho=0.1, gradient_agreement=0.97),
    ),
    build=_instructions,
    parent=dict(trainer_class=SFTTrainer, config_class=SFTConfig, **runs.PARENT),
    neutral={
        "packed": (dict(packing=True, max_length=128) | _SPLIT, dict(packing=True, max_length=128) | _SPLIT),
        "alpha-zero": (SYMNOISE | _SPLIT | dict(noise_alpha=0.0), _SPLIT),
        "tokens": (MSN | _SPLIT | dict(token_noise_length=0), _SPLIT),
        "hidden": (NOISEFIT | _SPLIT | dict(ce_weight=1.0, consistency_weight=0.0), _SPLIT),
        # transformers' own noise
        "tensor": (NEFTUNE | _SPLIT | dict(length_mode="tensor"), _SPLIT | dict(neftune_noise_alpha=1.5)),
        "full": (dict(peft=False), dict(peft=False)),
    },
    step=8,
    cases={
        "neftune": NEFTUNE | _SHORT,
        "symnoise": SYMNOISE | _SHORT,
        "noisefit": NOISEFIT | _SHORT,
        "msn": MSN | _SHORT,
        "uniform": dict(embedding_noise="uniform", noise_alpha=0.8) | _SHORT,
        "gaussian": dict(embedding_noise="gaussian", noise_alpha=0.8) | _SHORT,
    },
    wrong=_width_for_length,
    resumed=(
        NEFTUNE | dict(max_steps=4, save_strategy="steps", save_steps=2, peft=False),
        2,
        (dict(noise_alpha=1.0), "noise: neftune 1.5 there, neftune 1 here"),
    ),
    shared={},
    # TRL's other means are means of micro-batches' means
    compared=("loss", "noise/", "num_tokens"),
    ranks={
        "neftune-full": NEFTUNE | _SHORT | dict(peft=False),
        "noisefit-full": NOISEFIT | _SHORT | dict(peft=False),
        "symnoise-full": SYMNOISE | _SHORT | dict(peft=False),
        "symnoise-flat": SYMNOISE | _SHORT | dict(padding_free=True, max_length=None),
        "neftune-flat": NEFTUNE | _SHORT | dict(padding_free=True, max_length=None),
    },
    ddp=("noisefit",),
    sharded=("noisefit",),
    plain=dict(padding_free=False),
    describe=_told_of_instructions,
    counted=("of them within max_length",),
    forwards=_EVALUATED,
    recipes={
        "noisy_sft": dict(dataset_name="generated:arithmetic?n=16", gradient_accumulation_steps=1, noise_alpha=2.0)
    },
    unloaded=_OF_TEXTS,
)

dp_sft = Method(
    name="dp_sft",
    plain_lora=True,
    config=DPSFTConfig,
    refused=(
        dict(),
        dict(expected_batch_size=16),
        dict(target_epsilon=8.0),
        _PROMISE | dict(noise_multiplier=1.0),
        _PROMISE | dict(target_epsilon=0),
        _PROMISE | dict(target_epsilon=NAN),
        _PROMISE | dict(target_epsilon=True),
        _PROMISE | dict(target_delta=1.0),
        _PROMISE | dict(clip_norm=0.0),
        _PROMISE | dict(clip_norm=INF),
        _PROMISE | dict(clipping="adaptive"),
        _PROMISE | dict(accountant="prv"),
        _PROMISE | dict(accountant="rdp", neighbours="replace_one"),
        _PROMISE | dict(expected_batch_size=0),
        _PROMISE | dict(rows_per_unit=2),
        _PROMISE | dict(audit_canaries=3),
        _PROMISE | dict(max_grad_norm=1.0),
        _PROMISE | dict(packing=True),
        _PROMISE | dict(padding_free=True, max_length=None),
        _PROMISE | dict(loss_type="dft"),
        _PROMISE | dict(label_smoothing_factor=0.1),
        _PROMISE | dict(torch_compile=True),
        _PROMISE | dict(auto_find_batch_size=True),
        _PROMISE | dict(load_best_model_at_end=True, eval_strategy="steps"),
        _PROMISE | dict(save_strategy="best"),
        _PROMISE | dict(gradient_agreement=0.97),
        _PROMISE | dict(sam_rho=0.1),
        _PROMISE | dict(optim="adalomo"),
        _PROMISE | dict(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps"),
        _PROMISE | dict(train_sampling_strategy="group_by_length"),
        _PROMISE | dict(dataloader_drop_last=True),
    ),
    build=_private,
    # no trainer of TRL's has the mean over a row's own tokens
    parent={},
    neutral={},
    step=8,
    cases={"clipped": NOISELESS, "people": PEOPLE, "automatic": NOISELESS | dict(clipping="automatic")},
    wrong=_clip_micro_batches,
    resumed=(
        NOISELESS | dict(max_steps=4, save_strategy="steps", save_steps=2),
        2,
        (dict(clip_norm=0.25), "clip_norm: 0.5 there, 0.25 here"),
    ),
    shared={},
    ranks={"clipped-checkpointed": NOISELESS | dict(gradient_checkpointing=True)},
    unsharded=("clipped", "people", "automatic", "clipped-checkpointed"),
    unspread=("clipped", "people", "automatic", "clipped-checkpointed"),
    ddp=("people",),
    describe=_told_of_private,
    counted=("of them within max_length",),
    forwards=_EVALUATED,
    recipes={"dp_sft": dict(dataset_name="generated:arithmetic?n=64", expected_batch_size=4, target_delta=1e-3)},
    unloaded=_OF_TEXTS,
    laid_out=(
        dict(per_device_train_batch_size=2, num_train_epochs=1.5, expected_batch_size=5),
        dict(per_device_train_batch_size=4, expected_batch_size=13),
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=9, max_steps=3, expected_batch_size=2),
    ),
)

gift_sw = Method(
    name="gift_sw",
    config=NoisySFTConfig,
    given=lambda folder, use_cpu, bf16, **fields: GiftSWConfig(**fields),
    refused=(
        dict(bits=1),
        dict(bits=2.5),
        dict(bits=9),
        dict(r=0),
        dict(r=True),
        dict(noise="normal"),
        dict(metric="magnitude"),
        dict(weight_norm=0.5),
        dict(activation_norm=math.nan),
        dict(activation_power=-1),
        dict(calibration_rows=0),
        dict(r=16, lora_alpha=32),
        dict(lora_dropout=0.1),
        dict(use_rslora=True),
        dict(use_dora=True),
        dict(init_lora_weights="pissa"),
        dict(rank_pattern={"q_proj": 4}),
        dict(target_parameters=["experts.gate_up_proj"]),
    ),
    build=_salient,
    parent=dict(parent=True),
    neutral={"split": (dict(noise="none") | _SPLIT, _SPLIT)},
    step=8,
    cases={
        "pairs": dict(pairs=True, prefix_sharing="never") | _SHORT,
        "gaussian": _SHORT,
        "uniform": dict(noise="uniform") | _SHORT,
    },
    wrong=_draw_a_forward,
    resumed=(
        dict(max_steps=4, save_strategy="steps", save_steps=2),
        2,
        (dict(bits=2), "adapter_scheme: gift_sw 3 bits, auto noise"),
    ),
    shared={},
    compared=("loss", "noise/"),
    ranks={
        "gaussian-checkpointed": dict(gradient_checkpointing=True) | _SHORT,
        "noiseless": dict(noise="none") | _SHORT,
    },
    unspread=("pairs", "gaussian", "uniform", "gaussian-checkpointed", "noiseless"),
    ddp=("pairs",),
    describe=_told_of_columns,
    counted=("of them within max_length",),
    forwards=_EVALUATED,
    unloaded=_OF_TEXTS,
)

allora = Method(
    name="allora",
    config=NoisySFTConfig,
    given=lambda folder, use_cpu, bf16, **fields: ALLoRAConfig(**fields),
    refused=(
        dict(eta=0),
        dict(eta=-1.0),
        dict(eta=math.nan),
        dict(eta=math.inf),
        dict(eta=True),
        dict(eta="2"),
        dict(form="both"),
        dict(r=0),
        dict(r=8, lora_alpha=16),
        dict(lora_dropout=0.1),
        dict(lora_bias=True),
        dict(use_rslora=True),
        dict(use_dora=True),
        dict(init_lora_weights="pissa"),
        dict(init_lora_weights=False),
        dict(target_parameters=["experts.gate_up_proj"]),
        dict(alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
    ),
    build=_scaled,
    parent=dict(trainer_class=SFTTrainer, config_class=SFTConfig, **runs.PARENT),
    # TRL's own trainer takes the config as it is
    neutral={"split": (_SPLIT, _SPLIT)},
    step=8,
    cases={
        "pairs": dict(pairs=True, prefix_sharing="never", max_steps=3) | _SHORT,
        "gradient": _SHORT,
        "update": dict(form="update") | _SHORT,
    },
    wrong=_factors_a_micro_batch,
    resumed=(
        dict(max_steps=4, save_strategy="steps", save_steps=2),
        2,
        (dict(eta=3.0), "adapter_scheme: allora eta 2.0, gradient form there, allora eta 3.0"),
    ),
    shared={},
    compared=("loss", "allora/"),
    ranks={"gradient-checkpointed": dict(gradient_checkpointing=True) | _SHORT},
    # by RowScales
    unsharded=("update",),
    unspread=("update",),
    describe=_told_of_factors,
    counted=("of them within max_length",),
    forwards=_EVALUATED,
    unloaded=_OF_TEXTS,
)

# of every method and preset, as the families' folders make them public
CONFIGS = [getattr(posttrain, name) for name in posttrain.__all__ if name.endswith("Config")]
METHODS = {method.name: method for method in (robust_dpo, a_lol, policy_gradient, noisy_sft, dp_sft, gift_sw, allora)}
# recipes that train any adapter
ADAPTED = [recipe for method in METHODS.values() if not method.plain_lora for recipe in method.recipes]
