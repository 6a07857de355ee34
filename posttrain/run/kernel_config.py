"""Settings of how attention is computed on an accelerator: they change how fast a step is, and numbers by rounding."""

import math
from dataclasses import dataclass

from posttrain.config.setting import setting
from posttrain.errors import ConfigError

_MOST_COST = 1000.0


@dataclass
class KernelConfig:
    """Adds to a config what packed rows and torch's attention are given on an accelerator."""

    attention_cost_factor: float | None = setting(
        None,
        "What an attended position costs in packed rows, as a multiple of its share of the multiplications; more makes "
        "more and shorter rows. Default: 3 with sdpa on a CUDA device, an estimate, else 1.",
        identity=False,
        card=False,
    )
    packed_width_multiple: int | None = setting(
        None,
        "Packed rows are padded to a multiple of so many tokens, 1 to 4096. Default: 128 on an accelerator, so that "
        "kernels meet few shapes and keep their plans, else 1.",
        identity=False,
        card=False,
    )
    cudnn_attention: bool = setting(
        True,
        "Let torch's sdpa take cuDNN's kernels, which plan anew for each shape; false leaves its others.",
        identity=False,
        card=False,
    )

    def _read_kernels(self) -> None:
        """Check the settings of kernels. Raises ConfigError."""
        factor, multiple = self.attention_cost_factor, self.packed_width_multiple
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if factor is not None and not (number and math.isfinite(factor) and 0 < factor <= _MOST_COST):
            raise ConfigError(
                f"attention_cost_factor is {factor!r}; it must be a number above 0 and at most {_MOST_COST:g}, or be "
                "left out."
            )
        whole = isinstance(multiple, int) and not isinstance(multiple, bool)
        if multiple is not None and not (whole and 1 <= multiple <= 4096):
            raise ConfigError(
                f"packed_width_multiple is {multiple!r}; it must be a whole number from 1 to 4096, or be left out."
            )
        if not isinstance(self.cudnn_attention, bool):
            raise ConfigError(f"cudnn_attention is {self.cudnn_attention!r}; it must be true or false.")
