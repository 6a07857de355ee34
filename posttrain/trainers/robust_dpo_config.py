"""Settings of the robust preference trainer."""

from dataclasses import dataclass, field

from trl import DPOConfig

from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.objectives import preference
from posttrain.trainers._checks import check_choice
from posttrain.trainers._configs import CommonConfig, under_deepspeed

PAIR_LOSSES = ("dpo", "cdpo", "rdpo", "hinge", "ipo")
NEEDS_FLIP_RATE = ("cdpo", "rdpo")


@dataclass
class RobustDPOConfig(CommonConfig, DPOConfig):
    """Settings of `RobustDPOTrainer`: those of `trl.DPOConfig` and the ones below.

    Raises:
        ConfigError: (a ValueError) a value out of range, or a TRL setting that this trainer does not use.
    """

    pair_loss: str | None = field(
        default=None,
        metadata={
            "help": "Loss of a pair: dpo, cdpo, rdpo, hinge or ipo. Default: rdpo, or dpo where reduction is dr_dpo."
        },
    )
    flip_rate: float | None = field(
        default=None,
        metadata={
            "help": "Assumed share of flipped labels for rdpo and cdpo, in [0, 0.5). Default 0.1; 0 is plain DPO. "
            "A column flip_rate of the data sets it per row instead."
        },
    )
    reduction: str = field(
        default="mean",
        metadata={"help": "How pair losses become one loss: mean, or dr_dpo (the soft minimum of Dr. DPO)."},
    )
    beta_prime: float = field(
        default=1.0,
        metadata={
            "help": "Dr. DPO's temperature, above 0; smaller ignores more pairs, inf is DPO. 0.1 to 10 is usual."
        },
    )
    dr_dpo_scope: str = field(
        default="global",
        metadata={
            "help": "Pairs that Dr. DPO weighs against each other: global (the whole optimiser step, all ranks) or "
            "micro_batch (as the published code does; its result changes with the batch split)."
        },
    )
    dr_dpo_window: str = field(
        default="two_pass",
        metadata={
            "help": "How the global weights are found: two_pass (one more policy forward; works everywhere) or rescale "
            "(gradients are scaled once per step; no more forward; not under DeepSpeed or fp16)."
        },
    )
    prefix_sharing: str = field(
        default="auto",
        metadata={
            "help": "Compute the prompt of a pair once for both answers: auto (where the model allows), always (an "
            "error where it does not) or never (padded pairs, as TRL has them)."
        },
    )
    check_reference: bool = field(
        default=True,
        metadata={
            "help": "Stop where policy and reference, meant to be the same weights, differ before the first step."
        },
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of cached reference log-probabilities, used with precompute_ref_log_probs. Default: "
            "reference_logps in $POSTTRAIN_CACHE or ~/.cache/posttrain."
        },
    )

    def __post_init__(self):
        self._refuse_none()
        check_choice("reduction", self.reduction, ("mean", "dr_dpo"))
        check_choice("dr_dpo_scope", self.dr_dpo_scope, ("global", "micro_batch"))
        check_choice("dr_dpo_window", self.dr_dpo_window, ("two_pass", "rescale"))
        check_choice("prefix_sharing", self.prefix_sharing, ("auto", "always", "never"))
        if self.pair_loss is None:
            self.pair_loss = "dpo" if self.reduction == "dr_dpo" else "rdpo"
        check_choice("pair_loss", self.pair_loss, PAIR_LOSSES)
        if self.flip_rate is None:
            self.flip_rate = 0.1 if self.pair_loss in NEEDS_FLIP_RATE else 0.0
        try:
            self.flip_rate = preference.check_flip_rate(self.flip_rate)
            self.beta_prime = preference.check_beta_prime(self.beta_prime)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.flip_rate and self.pair_loss not in NEEDS_FLIP_RATE:
            raise ConfigError(
                f"flip_rate is {self.flip_rate:g}, which has no effect on pair_loss: {self.pair_loss}. Set "
                "`pair_loss: rdpo` or `cdpo`, or `flip_rate: 0`."
            )
        if isinstance(self.beta, str) or not self.beta > 0:
            raise ConfigError(f"beta is {self.beta!r}; it must be a number above 0 (0.1 is usual).")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ConfigError(f"ld_alpha is {self.ld_alpha}; it must lie in [0, 1], or be left out.")
        self._refuse_settings_without_effect()
        self._check_dr_dpo()
        super().__post_init__()

    def _refuse_settings_without_effect(self):
        loss_type = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        for name, value, neutral, instead in (
            ("loss_type", loss_type, ["sigmoid"], "choose with `pair_loss` (robust is `rdpo`)"),
            ("loss_weights", self.loss_weights, None, "one pair loss is trained at a time"),
            ("f_divergence_type", self.f_divergence_type, "reverse_kl", "only reverse_kl is supported"),
            ("use_weighting", self.use_weighting, False, "WPO weights are not combined with these losses"),
            (
                "label_smoothing",
                self.label_smoothing,
                0.0,
                "set `flip_rate` with `pair_loss: cdpo` or `rdpo`",
            ),
            ("padding_free", self.padding_free, False, "TRL itself ignores it for now"),
        ):
            if value != neutral:
                raise ConfigError(f"{name} is {value}, which this trainer does not use; {instead}. Leave {name} out.")

    def _check_dr_dpo(self):
        if self.reduction != "dr_dpo":
            return
        if self.pair_loss == "rdpo":
            raise ConfigError(
                "pair_loss is rdpo and reduction is dr_dpo; rDPO's loss is unbounded below, so Dr. DPO would lock on "
                "the lowest pair. Set `pair_loss: dpo` (or cdpo, hinge, ipo), or `reduction: mean`."
            )
        if self.dr_dpo_scope == "global" and self.dr_dpo_window == "rescale":
            if self.fp16:
                raise ConfigError(
                    "dr_dpo_window is rescale and fp16 is true; the gradient scaler of fp16 gets in its way. "
                    "Set `dr_dpo_window: two_pass`, or bf16."
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
