"""Settings that every preference trainer has."""

import copy
from dataclasses import dataclass
from typing import ClassVar

from posttrain.checks import check_choice
from posttrain.config.setting import setting
from posttrain.errors import ConfigError
from posttrain.privacy.config import PrivacyConfig
from posttrain.run import private_settings
from posttrain.run.config import CommonConfig


@dataclass(repr=False)
class PreferenceConfig(CommonConfig):
    """Adds to `trl.DPOConfig` what `PreferenceMixin` reads; a method's config is (this class, DPOConfig).

    The properties are answers of a method whose step is a plain mean over pairs. What `trl.DPOTrainer` would read to
    choose its loss is refused, by `_unused`: a method that reads a setting of it takes it out of there.
    """

    prefix_sharing: str = setting(
        "auto",
        "Compute the prompt of a pair once for both answers: auto (where the model allows), always (an "
        "error where it does not) or never (padded pairs, as TRL has them).",
        identity=False,
        card=True,
    )
    check_reference: bool = setting(
        True,
        "Stop where policy and reference, meant to be the same weights, differ before the first step.",
        identity=False,
        card=True,
    )
    ref_cache_dir: str | None = setting(
        None,
        "Folder of cached reference log-probabilities, used with precompute_ref_log_probs. Default: "
        "reference_logps in $POSTTRAIN_CACHE or ~/.cache/posttrain.",
        identity=False,
        card=False,
    )

    always_in_card: ClassVar = ("beta", "max_length")

    def as_private(self, privacy: PrivacyConfig) -> "PreferenceConfig":
        """Return a copy as a private run has it: pairs padded, and no cut of the gradient but that of each unit's.

        Raises ConfigError for settings with which pairs are not apart.
        """
        if not isinstance(privacy, PrivacyConfig) or isinstance(privacy, CommonConfig):
            raise ConfigError(f"privacy is a {type(privacy).__name__}; it must be a PrivacyConfig, or None.")
        made = copy.copy(self)
        made.privacy = privacy
        if "max_grad_norm" not in made._written:
            made.max_grad_norm = 0.0
        private_settings.check(made)
        made.prefix_sharing = "never"
        return made

    @property
    def weighs_pairs(self) -> bool:
        """Return whether a step's pairs are weighed unequally."""
        return False

    @property
    def reads_flip_rate(self) -> bool:
        """Return whether the loss of a pair depends on how likely its label is flipped."""
        return False

    @property
    def flip_rate_is_not_read_by(self) -> str:
        """Return what does not read a column flip_rate, where `reads_flip_rate` is false, for a warning."""
        return "this trainer"

    def _read_family(self):
        check_choice("prefix_sharing", self.prefix_sharing, ("auto", "always", "never"))
        if isinstance(self.beta, str) or not self.beta > 0:
            raise ConfigError(f"beta is {self.beta!r}; it must be a number above 0 (0.1 is usual).")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ConfigError(f"ld_alpha is {self.ld_alpha}; it must lie in [0, 1], or be left out.")

    def _unused(self):
        own = "its loss is the method's own"
        return {
            "loss_type": (("sigmoid", ["sigmoid"]), own),
            "loss_weights": ((None, [1.0]), own),
            "label_smoothing": ((0.0,), own),
            "f_divergence_type": (("reverse_kl",), "trl.DPOTrainer has it"),
            "use_weighting": ((False,), "trl.DPOTrainer has WPO weights"),
            "label_smoothing_factor": ((0.0,), own),
            "padding_free": ((False,), "TRL itself ignores it for now"),
        }
