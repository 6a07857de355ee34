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

    @property
    def columns_beside(self) -> tuple[str, ...]:
        """Return the columns of training rows that are read beside their texts."""
        return ()

    @property
    def draws_rows(self) -> bool:
        """Return whether a method draws the rows of each step by itself, and has a plan of that."""
        return False

    def planned(self, dataset):
        """Return the plan of the steps on tokenised rows, and set what follows from it; where `draws_rows`."""
        return None

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
