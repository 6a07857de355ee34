"""Settings of the trainer with noise."""

import math
from dataclasses import dataclass
from typing import ClassVar

from trl import SFTConfig

from posttrain.checks import check_choice
from posttrain.config.setting import setting
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.mechanisms.noise.draws import SPREADS
from posttrain.run.config import CommonConfig


@dataclass(repr=False)
class NoisySFTConfig(CommonConfig, SFTConfig):
    """Settings of `NoisySFTTrainer`: those of `trl.SFTConfig` and the ones below.

    Raises:
        ConfigError: (a ValueError) a value out of range, settings that exclude each other, or a TRL setting that this
            trainer does not use.
    """

    embedding_noise: str = setting(
        "none",
        "Noise on the input embeddings of the forward that is trained: none; neftune, uniform within noise_alpha / "
        "sqrt(L d) for a sequence of L tokens and d coordinates; uniform, sqrt(3) times that, so that a sequence's "
        "noise has the norm noise_alpha.",
        identity="noise",
        card=lambda args: args.adds_noise,
    )
    noise_alpha: float = setting(
        5.0,
        "Strength of the noise; 0 for none. Published: 5 to 15.",
        identity=False,
        card=lambda args: args.adds_noise,
    )

    always_in_card: ClassVar = ("max_length",)
    says: ClassVar = ("embedding_noise",)

    @property
    def adds_noise(self) -> bool:
        """Whether any forward gets noise."""
        return self.embedding_noise != "none" and self.noise_alpha > 0

    @property
    def noise(self) -> str | None:
        """The noise in words, which a resumed run must share; None where there is none."""
        return f"{self.embedding_noise} {self.noise_alpha:g}" if self.adds_noise else None

    def _read(self):
        if self.neftune_noise_alpha is not None:
            raise ConfigError(
                f"neftune_noise_alpha is {self.neftune_noise_alpha}, whose noise falls on every forward in training "
                "mode and shrinks with padding and packing. Use embedding_noise instead: `embedding_noise: neftune` "
                f"and `noise_alpha: {self.neftune_noise_alpha}`."
            )
        check_choice("embedding_noise", self.embedding_noise, ("none", *SPREADS))
        alpha = self.noise_alpha
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha < math.inf:
            raise ConfigError(f"noise_alpha is {alpha!r}; it must be a number of 0 or more.")
        if self.embedding_noise == "none" and alpha > 0:
            self._has_no_effect(
                "noise_alpha",
                type(self).__dataclass_fields__["noise_alpha"].default,
                ("embedding_noise",),
                f"noise_alpha is {alpha:g}, which has no effect on embedding_noise: none. Set `embedding_noise: "
                "neftune`, or leave noise_alpha out.",
            )
        check_choice("loss_type", self.loss_type, ("nll", "dft", "chunked_nll"))
        check_choice("truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))
        if self.packing and self.max_length is None:
            raise ConfigError("packing is true, and max_length is null: rows are filled up to it. Set max_length.")
        if self.padding_free and not self.packing and self.max_length is not None:
            raise ExcludedSetting(
                f"padding_free is true, where nothing cuts rows to max_length ({self.max_length}). Set `max_length: "
                "null`, or `packing: true`.",
                # left out, max_length would be TRL's
                {"padding_free": ("max_length", "packing")},
            )
        if not self.adds_noise:
            return
        if self.packing and self.packing_strategy == "wrapped":
            raise ExcludedSetting(
                f"packing_strategy is wrapped with embedding_noise: {self.embedding_noise}: such rows do not tell "
                "where a sequence begins, and the noise goes by its length. Set `packing_strategy: bfd`.",
                {"packing_strategy": ("embedding_noise",)},
            )
        if self.torch_compile:
            raise ExcludedSetting(
                f"torch_compile is true with embedding_noise: {self.embedding_noise}, which is added by a hook that is "
                "there in some forwards only. Leave torch_compile out.",
                {"torch_compile": ("embedding_noise",)},
            )
