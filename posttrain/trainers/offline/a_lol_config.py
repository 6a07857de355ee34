"""Settings of the A-LoL trainer."""

import math
from dataclasses import dataclass
from typing import ClassVar

from trl import SFTConfig

from posttrain.checks import check_choice
from posttrain.config.setting import setting
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.log import get_logger
from posttrain.objectives import offline
from posttrain.run.engines import under_fsdp
from posttrain.trainers.offline.config import OfflineConfig

VALUES = ("mean", "per_prompt", "column", "head")
WEIGHTINGS = ("weight", "sample", "sample_and_weight")


def _has_head(args) -> bool:
    return args.value == "head"


@dataclass(repr=False)
class ALoLConfig(OfflineConfig, SFTConfig):
    """Settings of `ALoLTrainer`: those of `trl.SFTConfig` and the ones below.

    Raises:
        ConfigError: (a ValueError) a value out of range, settings that exclude each other, or a TRL setting that this
            trainer does not use.
    """

    variant: str = setting(
        "a_lol",
        "Loss of an answer: nll, wbc, r_gold or r_lol (weighed by rewards), a_lol, a_lol_seq (ratios per "
        "token), a_lol_ref_free or a_lol_kl (weighed by advantages).",
        identity=True,
        card=lambda args: True,
    )
    clip: float | None = setting(
        0.9,
        "Importance ratios are held in [1 - clip, 1 + clip], above 0; null for the exact ratio. For r_lol, "
        "a_lol and a_lol_seq.",
        identity=True,
        card=lambda args: args.needs_reference,
        infinite=True,
    )
    kl_beta: float = setting(
        0.0, "Weight of the KL part of variant a_lol_kl: the advantage must exceed it.", identity=True, card=True
    )
    value: str = setting(
        "mean",
        "Expected reward that an answer is compared with: mean (of all training rewards), per_prompt (mean "
        "of the prompt's answers), column (yours, see value_column) or head (learned from the prompt).",
        identity=True,
        card=lambda args: args.weighs_by == "advantages",
    )
    value_column: str | None = setting(
        None, "Column of values for value: column. Default: baseline.", identity=True, card=True
    )
    advantage_weighting: str = setting(
        "weight",
        "weight: rows drawn alike, the loss weighed; sample: rows drawn by weight, the same gradient in "
        "expectation; sample_and_weight: both, so weights count squared, as in the published runs.",
        identity=True,
        card=lambda args: args.weighs_by is not None,
    )
    keep_negative_advantages: bool = setting(
        False,
        "Push answers below their value down, without bound, as published for a_lol_ref_free. By default "
        "they are left out.",
        identity=True,
        card=True,
    )
    reward_max: float = setting(
        1.0,
        "Largest reward, for value: head, whose values lie between 0 and it.",
        identity=_has_head,
        card=True,
    )
    value_folds: int = setting(
        5,
        "Folds of prompts for value: head; a prompt's value comes from a head that never saw it.",
        identity=_has_head,
        card=True,
    )
    value_epochs: int = setting(10, "Epochs of training of the value head.", identity=_has_head, card=True)
    value_learning_rate: float = setting(1e-4, "Learning rate of the value head, AdamW.", identity=_has_head, card=True)
    value_prompts: int = setting(
        4096,
        "Most prompts that the value head learns from, drawn by the seed.",
        identity=_has_head,
        card=True,
    )
    value_targets: str = setting(
        "answers",
        "What the value head learns: the rewards of a prompt's scored answers, or of the starting model's "
        "own greedy generations (needs a reward function).",
        identity=_has_head,
        card=True,
    )
    value_max_new_tokens: int = setting(128, "Longest of those generations, in tokens.", identity=_has_head, card=True)
    value_head_dir: str | None = setting(
        None, "Folder where value heads are looked for and kept. Default: output_dir.", identity=False, card=False
    )

    nulls: ClassVar = OfflineConfig.nulls | {"clip": "exact importance ratios"}
    says: ClassVar = ("variant", "value")

    def _read(self):
        check_choice("variant", self.variant, offline.VARIANTS)
        check_choice("value", self.value, VALUES)
        check_choice("advantage_weighting", self.advantage_weighting, WEIGHTINGS)
        for name in ("clip", "kl_beta", "reward_max", "value_learning_rate"):
            value = getattr(self, name)
            if isinstance(value, bool | str) or (value is None and name != "clip"):
                raise ConfigError(f"{name} is {value!r}; it must be a number.")
        try:
            offline.check_settings("a_lol_kl", None, self.kl_beta)
            # a clip out of range also where it is not read: a sweep over variants must not hide it
            offline.check_settings("a_lol", self.clip, 0.0)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        try:
            offline.check_settings(self.variant, self.clip, self.kl_beta)
        except ValueError as error:
            raise ExcludedSetting(str(error), {"kl_beta": ("variant",)}) from None
        if self.value == "column":
            self.value_column = self.value_column or "baseline"
        elif self.value_column is not None:
            raise ExcludedSetting(
                f"value_column is {self.value_column!r}, which has no effect on value: {self.value}. Set "
                "`value: column`, or leave value_column out.",
                {"value_column": ("value",)},
            )
        self._check_head()
        self._check_weighting()
        self._check_engine()
        self._warn_of_settings_without_effect()

    @property
    def weighs_by(self) -> str | None:
        return offline.weight_of(self.variant)

    @property
    def needs_reference(self) -> bool:
        return self.variant in offline.NEEDS_REFERENCE

    @property
    def drawn_by(self) -> str | None:
        drawn = self.advantage_weighting != "weight"
        return f"advantage_weighting is {self.advantage_weighting}" if drawn else None

    def _check_head(self):
        for name in ("reward_max", "value_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a number above 0.")
        check_choice("value_targets", self.value_targets, ("answers", "generations"))
        for name, lowest in (
            ("value_folds", 2), ("value_epochs", 1), ("value_prompts", 1), ("value_max_new_tokens", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of {lowest} or more.")
        if self.value == "head" and self.value_prompts < self.value_folds:
            raise ConfigError(
                f"value_prompts is {self.value_prompts}, below value_folds ({self.value_folds}): each fold's head "
                "learns from prompts of the other folds. Raise value_prompts, to 100 and more."
            )
        if self.value_targets != "answers" and self.value != "head":
            raise ExcludedSetting(
                f"value_targets is {self.value_targets}, which has no effect on value: {self.value}. Set `value: "
                "head`, or leave it out.",
                {"value_targets": ("value", "variant")},
            )
        if self.value == "head" and self.weighs_by != "advantages":
            raise ExcludedSetting(
                f"value is head, which variant {self.variant} has no use for: it does not weigh by advantages. Leave "
                "value out, or choose a variant named a_lol.",
                {"value": ("variant",)},
            )

    def _check_engine(self):
        """Refuse to forward the starting model before training under FSDP, which places it no sooner."""
        if not under_fsdp(self) or not (self.needs_reference or self.value == "head"):
            return
        others = ", ".join(variant for variant in offline.VARIANTS if variant not in offline.NEEDS_REFERENCE)
        if self.value == "head":
            what, instead = "value is head, which reads the states of the starting model", "set `value: mean`"
        else:
            what = f"variant is {self.variant}, whose loss reads the starting model's log-probabilities"
            instead = f"choose a variant that reads none ({others})"
        raise ConfigError(
            f"{what}, under FSDP, which places the model when training begins. Launch with DDP or ZeRO "
            f"(configs/accelerate/ddp.yaml, zero2.yaml, zero3.yaml), or {instead}."
        )

    def _check_weighting(self):
        if self.keep_negative_advantages:
            if self.weighs_by != "advantages":
                raise ExcludedSetting(
                    f"keep_negative_advantages is true, and variant {self.variant} does not weigh by advantages. Leave "
                    "it out.",
                    {"keep_negative_advantages": ("variant",)},
                )
            get_logger().warning(
                "keep_negative_advantages: answers below their value are pushed down, and nothing bounds how far; "
                "watch nll and stop early."
            )
        if self.advantage_weighting == "weight":
            return
        if self.weighs_by is None:
            raise ExcludedSetting(
                f"advantage_weighting is {self.advantage_weighting}, and variant nll has no weights to draw by. Set "
                "`advantage_weighting: weight`.",
                {"advantage_weighting": ("variant",)},
            )
        reason = None
        if self.kl_beta:
            reason = f"kl_beta is {self.kl_beta:g}, so answers without advantage are trained on as well"
        elif self.keep_negative_advantages:
            reason = "keep_negative_advantages is true"
        if reason:
            raise ExcludedSetting(
                f"advantage_weighting is {self.advantage_weighting}, and {reason}: a negative weight cannot be drawn "
                "by. Set `advantage_weighting: weight`.",
                {
                    "advantage_weighting": ("kl_beta", "variant", "keep_negative_advantages"),
                    "keep_negative_advantages": ("advantage_weighting",),
                },
            )
        if self.train_sampling_strategy != "random":
            raise ExcludedSetting(
                f"train_sampling_strategy is {self.train_sampling_strategy} with advantage_weighting: "
                f"{self.advantage_weighting}, which draws the rows itself. Leave one of them out.",
                {
                    "train_sampling_strategy": ("advantage_weighting",),
                    "advantage_weighting": ("train_sampling_strategy",),
                },
            )

    def _warn_of_settings_without_effect(self):
        """Warn of settings without effect that a sweep over variants may keep for all of them."""
        fields = type(self).__dataclass_fields__
        by_advantage, head = self.weighs_by == "advantages", self.value == "head"
        for name, used, why in (
            ("clip", self.needs_reference, f"variant {self.variant} has no importance ratio"),
            ("value", by_advantage or head, f"variant {self.variant} does not weigh by advantages"),
            ("reward_max", head, f"value is {self.value}"),
            ("value_head_dir", head, f"value is {self.value}"),
        ):
            if not used and getattr(self, name) != fields[name].default:
                get_logger().warning("%s: %s has no effect here: %s.", name, getattr(self, name), why)

    def _unused(self):
        unused = super()._unused()
        return unused | {"loss_type": (unused["loss_type"][0], "choose with `variant`")}
