"""Settings of the robust preference trainer."""

import math
from dataclasses import dataclass
from typing import ClassVar

from trl import DPOConfig

from posttrain.checks import check_choice
from posttrain.config.setting import setting
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.log import get_logger
from posttrain.objectives import preference
from posttrain.run.config import under_deepspeed
from posttrain.trainers.preference.config import PreferenceConfig

PAIR_LOSSES = ("dpo", "cdpo", "rdpo", "hinge", "ipo")
NEEDS_FLIP_RATE = ("cdpo", "rdpo")
# TRL's names
LOSS_TYPES = {"sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "robust": "rdpo"}


@dataclass(repr=False)
class RobustDPOConfig(PreferenceConfig, DPOConfig):
    """Settings of `RobustDPOTrainer`: those of `trl.DPOConfig` and the ones below.

    At the defaults it is TRL's DPO. `loss_type: sigmoid | hinge | ipo | robust` chooses the pair loss by TRL's name for
    it, robust with `label_smoothing` as flip_rate.

    Raises:
        ConfigError: (a ValueError) a value out of range, or a TRL setting that this trainer does not use.
    """

    pair_loss: str | None = setting(
        None,
        "Loss of a pair: dpo, cdpo, rdpo, hinge or ipo. Default: rdpo where flip_rate is above 0, else dpo.",
        identity=True,
        card=True,
    )
    flip_rate: float | None = setting(
        None,
        "Assumed share of flipped labels, in [0, 0.5). Default: 0.1 with pair_loss rdpo or cdpo; 0 is "
        "plain DPO. A column flip_rate of the data sets it per row instead.",
        identity=True,
        card=True,
    )
    reduction: str = setting(
        "mean",
        "How pair losses become one loss: mean, or dr_dpo (the soft minimum of Dr. DPO).",
        identity=True,
        card=True,
    )
    beta_prime: float = setting(
        1.0,
        "Dr. DPO's temperature, above 0; smaller ignores more pairs, inf is DPO. 0.1 to 10 is usual.",
        identity=True,
        card=True,
        infinite=True,
    )
    dr_dpo_scope: str = setting(
        "global",
        "Pairs that Dr. DPO weighs against each other: global (the whole optimiser step, all ranks) or "
        "micro_batch (as the published code does; its result changes with the batch split).",
        identity=True,
        card=True,
    )
    dr_dpo_window: str = setting(
        "two_pass",
        "How the global weights are found: two_pass (one more policy forward; works everywhere) or rescale "
        "(gradients are scaled once per step; no more forward; not under DeepSpeed or fp16).",
        identity=True,
        card=True,
    )

    replaces: ClassVar = {"loss_type": ("pair_loss",), "pair_loss": ("loss_type",)}
    says: ClassVar = ("pair_loss", "flip_rate")
    not_apart: ClassVar = (
        ("reduction", ("mean",), "weighs each pair by the others of its step"),
        ("prefix_sharing", ("auto", "never"), "packs pairs into one sequence, whose gradients are not apart"),
    )

    @property
    def weighs_pairs(self) -> bool:
        """Return whether a step's pairs are weighed unequally: Dr. DPO, which at beta_prime inf is the plain mean."""
        return self.reduction == "dr_dpo" and not math.isinf(self.beta_prime)

    @property
    def reads_flip_rate(self) -> bool:
        return self.pair_loss in NEEDS_FLIP_RATE

    @property
    def flip_rate_is_not_read_by(self) -> str:
        return f"pair_loss {self.pair_loss}; `pair_loss: rdpo` or `cdpo` reads it"

    def _read(self):
        check_choice("reduction", self.reduction, ("mean", "dr_dpo"))
        check_choice("dr_dpo_scope", self.dr_dpo_scope, ("global", "micro_batch"))
        check_choice("dr_dpo_window", self.dr_dpo_window, ("two_pass", "rescale"))
        self._read_loss_type()
        if self.pair_loss is None:
            self.pair_loss = "rdpo" if self.flip_rate and self.reduction == "mean" else "dpo"
        check_choice("pair_loss", self.pair_loss, PAIR_LOSSES)
        if self.flip_rate is None:
            self.flip_rate = 0.1 if self.pair_loss in NEEDS_FLIP_RATE else 0.0
        try:
            self.flip_rate = preference.check_flip_rate(self.flip_rate)
            self.beta_prime = preference.check_beta_prime(self.beta_prime)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.flip_rate and self.pair_loss not in NEEDS_FLIP_RATE:
            raise ExcludedSetting(
                f"flip_rate is {self.flip_rate:g}, which has no effect on pair_loss: {self.pair_loss}. Set "
                f"`pair_loss: {'rdpo` or `' * (self.reduction == 'mean')}cdpo`, or `flip_rate: 0`.",
                {"flip_rate": ("pair_loss", "loss_type", "reduction")},
            )
        self._check_label_smoothing()
        self._check_dr_dpo()

    def _read_loss_type(self):
        """Read the pair loss from TRL's `loss_type`, where that is given."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type or ())
        weights = self.loss_weights
        if len(names) != 1 or (weights is not None and list(weights) != [1.0]):
            raise ConfigError(
                f"loss_type is {names} with loss_weights {weights}; this trainer trains one pair loss at weight 1. "
                "trl.DPOTrainer sums several."
            )
        if names[0] not in LOSS_TYPES:
            raise ConfigError(
                f"loss_type is {names[0]}, which this trainer does not have: it has {', '.join(LOSS_TYPES)}, and "
                "trl.DPOTrainer the others."
            )
        pair_loss = LOSS_TYPES[names[0]]
        # sigmoid beside a pair_loss is TRL's default, as a config that was copied field by field has it
        if self.pair_loss is None and "loss_type" in self._written:
            self.pair_loss = pair_loss
        elif self.pair_loss is None and names != ["sigmoid"]:
            self.pair_loss = pair_loss
        elif names != ["sigmoid"] and self.pair_loss != pair_loss:
            raise ConfigError(f"loss_type is {names[0]} and pair_loss is {self.pair_loss}; give one of them.")
        if names == ["robust"]:
            if self.flip_rate is None:
                self.flip_rate = self.label_smoothing
            if not self.flip_rate:
                get_logger().warning(
                    "loss_type robust with label_smoothing 0 is plain DPO: it assumes no flipped label"
                )

    def _check_label_smoothing(self):
        if self.label_smoothing and (self.pair_loss != "rdpo" or self.label_smoothing != self.flip_rate):
            what = f"flip_rate is {self.flip_rate:g}" if self.pair_loss in NEEDS_FLIP_RATE else "it reads none"
            raise ExcludedSetting(
                f"label_smoothing is {self.label_smoothing}, which has no effect on pair_loss: {self.pair_loss} "
                f"({what}). Set `flip_rate` with `pair_loss: rdpo` or `cdpo`, and leave label_smoothing out.",
                {"label_smoothing": ("pair_loss", "loss_type", "flip_rate"), "flip_rate": ("label_smoothing",)},
            )

    def _unused(self):
        read = ("loss_type", "loss_weights", "label_smoothing")
        unused = {name: told for name, told in super()._unused().items() if name not in read}
        return unused | {"label_smoothing_factor": ((0.0,), "write `flip_rate` with `pair_loss: cdpo`")}

    def _check_dr_dpo(self):
        if self.reduction != "dr_dpo":
            return
        self._check_update_of_weighed_pairs()
        if self.pair_loss == "rdpo":
            raise ExcludedSetting(
                "pair_loss is rdpo and reduction is dr_dpo; rDPO's loss is unbounded below, so Dr. DPO would lock on "
                "the lowest pair. Set `pair_loss: dpo` (or cdpo, hinge, ipo), or `reduction: mean`.",
                {"pair_loss": ("reduction",), "loss_type": ("reduction",), "reduction": ("pair_loss", "loss_type")},
            )
        if self.dr_dpo_scope == "global" and self.dr_dpo_window == "rescale":
            if self.fp16:
                raise ExcludedSetting(
                    "dr_dpo_window is rescale and fp16 is true; the gradient scaler of fp16 gets in its way. "
                    "Set `dr_dpo_window: two_pass`, or bf16.",
                    {"dr_dpo_window": ("fp16",)},
                )
            if under_deepspeed(self):
                raise ConfigError(
                    "dr_dpo_window is rescale under DeepSpeed, which keeps gradients inside its engine. "
                    "Set `dr_dpo_window: two_pass`."
                )
        if self.dr_dpo_scope == "micro_batch" and self.per_device_train_batch_size == 1:
            get_logger().warning(
                "dr_dpo_scope is micro_batch with per_device_train_batch_size 1: of one pair Dr. DPO is DPO. "
                "Set `dr_dpo_scope: global`."
            )

    def _check_update_of_weighed_pairs(self):
        if self.weighs_pairs and self.sam_rho:
            raise ExcludedSetting(
                f"sam_rho is {self.sam_rho} and reduction is dr_dpo, which weighs pairs by their losses at the weights "
                "themselves, and SAM takes its gradient at others. Set `reduction: mean`, or leave sam_rho out.",
                {"sam_rho": ("reduction",), "reduction": ("sam_rho",)},
            )
        rescales = self.dr_dpo_scope == "global" and self.dr_dpo_window == "rescale"
        if self.weighs_pairs and rescales and self.gradient_agreement is not None:
            raise ExcludedSetting(
                f"dr_dpo_window is rescale and gradient_agreement is {self.gradient_agreement}; gradients are divided "
                "by the weights of all pairs at the end of a step, also of those left out. Set `dr_dpo_window: "
                "two_pass`, or leave gradient_agreement out.",
                {"dr_dpo_window": ("gradient_agreement",), "gradient_agreement": ("dr_dpo_window",)},
            )
