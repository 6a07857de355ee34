"""Settings that every trainer on instructions has."""

from dataclasses import dataclass
from typing import ClassVar

from posttrain.checks import check_choice
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.run.config import CommonConfig


@dataclass(repr=False)
class InstructionConfig(CommonConfig):
    """Checks of `trl.SFTConfig` what `InstructionMixin` reads; a method's config is (this class, SFTConfig)."""

    always_in_card: ClassVar = ("max_length",)

    def _read_family(self):
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
