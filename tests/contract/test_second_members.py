"""A method that joins a family declares what is its own; the rest is the family's, at neutral answers."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import posttrain
from posttrain import ALoLConfig, ALoLTrainer, PolicyGradientConfig
from posttrain.config.setting import identity_of, setting, told_in_card
from posttrain.errors import ConfigError
from posttrain.mechanisms.row_groups import CHOSEN, REJECTED
from posttrain.objectives import preference
from posttrain.recipe import instructions, preferences, scored_answers
from posttrain.trainers.offline.config import OfflineConfig
from posttrain.trainers.offline.mixin import OfflineMixin
from posttrain.trainers.offline.prepare import Answers
from posttrain.trainers.preference.config import PreferenceConfig
from posttrain.trainers.preference.mixin import PreferenceMixin
from posttrain.trainers.preference.prepare import check_flip_rates
from posttrain.trainers.sft.config import InstructionConfig
from posttrain.trainers.sft.mixin import InstructionMixin
from tests import runs, scored, training
from tests.conftest import make_pairs
from tests.runs import distance, identical

SPLIT = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
PADDED = SPLIT | dict(prefix_sharing="never")


@dataclass(repr=False)
class OffsetDPOConfig(PreferenceConfig, DPOConfig):
    offset: float = setting(0.0, "Margin that the chosen answer has to win by.", identity=True, card=True)

    def _read(self):
        if not self.offset >= 0:
            raise ConfigError(f"offset is {self.offset!r}; it must be 0 or more. Write `offset: 1.0`.")


class OffsetDPOTrainer(PreferenceMixin, DPOTrainer):
    _config_class = OffsetDPOConfig
    _name = "Offset DPO"
    _tag_names = ["trl", "posttrain", "offset_dpo", "dpo"]

    def pair_losses(self, chosen_logratios, rejected_logratios, inputs):
        groups = self.groups_of(inputs)
        margins = groups.mean(chosen_logratios, CHOSEN) - groups.mean(rejected_logratios, REJECTED)
        return preference.dpo(self.beta * margins - self.args.offset)


@dataclass(repr=False)
class ScaledSFTConfig(InstructionConfig, SFTConfig):
    loss_scale: float = setting(1.0, "Factor on the loss.", identity=True, card=True)


class ScaledSFTTrainer(InstructionMixin, SFTTrainer):
    _config_class = ScaledSFTConfig
    _name = "Scaled SFT"
    _tag_names = ["trl", "posttrain", "scaled_sft", "sft"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return found if return_outputs else found * self.args.loss_scale


@dataclass(repr=False)
class ThresholdConfig(OfflineConfig, SFTConfig):
    threshold: float = setting(0.0, "Least reward of an answer that is learned.", identity=True, card=True)


class ThresholdAnswers(Answers):
    def weigh(self, dataset, name, trainer=None):
        return dataset.add_column("weight", [float(reward >= self.args.threshold) for reward in dataset["reward"]])


class ThresholdTrainer(OfflineMixin, SFTTrainer):
    _config_class, _answers_class = ThresholdConfig, ThresholdAnswers
    _name = "SFT on good answers"
    _tag_names = ["trl", "posttrain", "threshold", "sft"]

    def sequence_losses(self, logps, mask, inputs):
        return -torch.where(mask, logps, 0.0).sum(dim=1)


@dataclass(repr=False)
class BonusConfig(PolicyGradientConfig):
    bonus: float = setting(0.0, "Added to every reward.", identity=True, card=True)

    def _read(self):
        if not self.bonus >= 0:
            raise ConfigError(f"bonus is {self.bonus!r}; it must be 0 or more.")


# by family: an invented member's settings, which of them are its own, and what the family's recipes share
MEMBERS = {
    "preference": (OffsetDPOConfig, {}, "offset", "preferences"),
    "sft": (ScaledSFTConfig, {}, "loss_scale", "instructions"),
    "offline": (ThresholdConfig, {}, "threshold", "scored_answers"),
    "policy_gradient": (
        BonusConfig, dict(num_generations=4, per_device_train_batch_size=4, estimator="grpo"), "bonus", "tasks",
    ),
}  # fmt: skip


def _read_settings(tree) -> set[str]:
    """Names of the settings that a module reads as `args.NAME`, or `anything.args.NAME`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (getattr(node.value, "id", None) in ("args", "training_args") or getattr(node.value, "attr", "") == "args")
    }


def _modules(family: str) -> dict[Path, ast.Module]:
    """The modules that a family's mixin and `prepare` stand on, those of its own folder."""
    folder, found, left = Path(posttrain.__file__).parent / "trainers" / family, {}, ["mixin", "prepare"]
    while left:
        path = folder / f"{left.pop()}.py"
        if path in found or not path.exists():
            continue
        found[path] = ast.parse(path.read_text())
        for node in ast.walk(found[path]):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"posttrain.trainers.{family}."):
                left += [node.module.rpartition(".")[2], *(name.name for name in node.names)]
    return found


@pytest.mark.parametrize("family", MEMBERS)
def test_a_family_reads_no_setting_that_one_member_alone_has(family, tmp_path):
    kind, settings, own, recipe = MEMBERS[family]
    known = set(dir(kind(output_dir=str(tmp_path), report_to=[], **settings))) - {own}
    recipe = Path(posttrain.__file__).parent / "recipe" / f"{recipe}.py"
    modules = _modules(family) | {recipe: ast.parse(recipe.read_text())}
    assert {path.name: _read_settings(tree) - known for path, tree in modules.items()} == dict.fromkeys(
        (path.name for path in modules), set()
    )
    # the reader sees the settings of a member where they are read
    assert len(set().union(*map(_read_settings, modules.values()))) > 5


def _offset(folder, output_dir, trainer_class=OffsetDPOTrainer, config_class=OffsetDPOConfig, **settings):
    kinds = dict(trainer_class=trainer_class, config_class=config_class)
    return training.train(folder, output_dir, **kinds, **settings)[0]


def _instructed(folder, output_dir, trainer_class=ScaledSFTTrainer, config_class=ScaledSFTConfig, **settings):
    rows = scored.make_scored(16).remove_columns("reward")
    kinds = dict(trainer_class=trainer_class, config_class=config_class)
    return scored.train(folder, output_dir, rows, **kinds, **settings)[0]


def test_a_second_preference_method_at_its_neutral_setting_is_trls_bit_for_bit(tiny_folder, tmp_path):
    args = OffsetDPOConfig(**training.settings(tmp_path / "dry", **PADDED))
    told = preferences.describe(tiny_folder, args, make_pairs(16), runs.lora())
    assert told["training pairs"] == 16 and told["steps"] == 2
    parent = dict(trainer_class=DPOTrainer, config_class=DPOConfig, **runs.PARENT)
    reference = _offset(tiny_folder, tmp_path / "trl", **parent, **SPLIT)
    assert identical(_offset(tiny_folder, tmp_path / "neutral", **PADDED), reference)
    # shared and cached as any member of the family
    cached = dict(ref_cache_dir=str(tmp_path / "cache"), precompute_ref_log_probs=True, prefix_sharing="always")
    change = _offset(tiny_folder, tmp_path / "offset", **SPLIT, **cached, offset=0.5)
    assert distance(change, reference) > 1e-2 and any((tmp_path / "cache").iterdir())


def test_a_second_method_of_instructions_at_its_neutral_setting_is_trls_bit_for_bit(tiny_folder, tmp_path):
    rows, settings = scored.make_scored(16).remove_columns("reward"), scored.settings(tmp_path / "dry", **SPLIT)
    del settings["prefix_sharing"]
    told = instructions.describe(tiny_folder, ScaledSFTConfig(**settings), rows, runs.lora())
    assert told["of them within max_length"] == 16 and told["steps"] == 2
    parent = dict(trainer_class=SFTTrainer, config_class=SFTConfig, **runs.PARENT)
    reference = _instructed(tiny_folder, tmp_path / "trl", **parent, **SPLIT)
    assert identical(_instructed(tiny_folder, tmp_path / "neutral", **SPLIT), reference)
    assert distance(_instructed(tiny_folder, tmp_path / "scaled", **SPLIT, loss_scale=0.5), reference) > 1e-2


def test_a_second_offline_method_at_its_neutral_setting_is_the_likelihood_of_answers(tiny_folder, tmp_path):
    args, given = (
        ThresholdConfig(**scored.settings(tmp_path / "dry", threshold=0.5)),
        scored_answers.ScoredArguments(dataset_name="a"),
    )
    rows = scored.make_scored(16)
    told = scored_answers.describe(tiny_folder, args, given, rows, runs.lora(), answers_class=ThresholdAnswers)
    assert told["of them with a gradient"] == sum(reward >= 0.5 for reward in rows["reward"]) < 16

    def trained(name, trainer_class, config_class, **settings):
        settings = scored.settings(tmp_path / name, **SPLIT, **settings)
        trainer = trainer_class(
            model=tiny_folder, args=config_class(**settings), train_dataset=rows, peft_config=runs.lora()
        )
        return runs.fit(trainer)[0]

    reference = trained("nll", ALoLTrainer, ALoLConfig, variant="nll")
    assert identical(trained("neutral", ThresholdTrainer, ThresholdConfig), reference)
    assert distance(trained("half", ThresholdTrainer, ThresholdConfig, threshold=0.5), reference) > 1e-2


@pytest.mark.parametrize(
    ("kind", "given", "match"),
    [
        (OffsetDPOConfig, dict(prefix_sharing="alway"), "prefix_sharing is 'alway'"),
        (OffsetDPOConfig, dict(loss_type="hinge"), "loss_type is hinge, which this trainer does not use; its loss is"),
        (OffsetDPOConfig, dict(label_smoothing=0.1), "label_smoothing is 0.1, which this trainer does not use"),
        (OffsetDPOConfig, dict(use_weighting=True), "use_weighting is True, which this trainer does not use"),
        (OffsetDPOConfig, dict(ld_alpha=2.0), "ld_alpha is 2.0; it must lie in"),
        (OffsetDPOConfig, dict(offset=-1.0), "offset is -1.0"),
        (ScaledSFTConfig, dict(padding_free=True, max_length=64), "padding_free is true, where nothing cuts rows"),
        (ThresholdConfig, dict(prefix_sharing="alway"), "prefix_sharing is 'alway'"),
        (ThresholdConfig, dict(packing=True), "packing is True, .* a row has a weight, so rows cannot be joined"),
    ],
)
def test_what_a_familys_mixin_cannot_take_is_refused_of_every_member(kind, given, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        kind(output_dir=str(tmp_path), report_to=[], **given)


def test_a_second_members_card_and_identity_hold_its_own_settings(tmp_path):
    args = OffsetDPOConfig(output_dir=str(tmp_path), report_to=[], offset=0.5, prefix_sharing="never")
    assert list(told_in_card(args).items()) == [("offset", 0.5), ("prefix_sharing", "never")]
    # beside what every config has
    shared = dict(update_rule=None, refactor_every=0, refactor_second_moment="estimate")
    assert identity_of(args) == {"offset": 0.5} | shared
    assert args.inherited_in_card().keys() == {"beta", "max_length"}
    assert OffsetDPOConfig(**args.to_dict()).to_dict() == args.to_dict()


def test_a_column_that_a_second_member_does_not_read_is_said(tmp_path, caplog):
    args = OffsetDPOConfig(output_dir=str(tmp_path), report_to=[])
    check_flip_rates(args, make_pairs(2).add_column("flip_rate", [0.9, 0.1]), None)
    assert "column flip_rate is not read by this trainer" in caplog.text
