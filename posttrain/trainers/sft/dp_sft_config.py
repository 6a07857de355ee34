"""Settings of the private trainer."""

from dataclasses import dataclass, field
from typing import ClassVar

from trl import SFTConfig

from posttrain.config.setting import setting
from posttrain.errors import ConfigError
from posttrain.privacy.config import PrivacyConfig
from posttrain.trainers.sft.config import InstructionConfig


@dataclass(repr=False)
class DPSFTConfig(PrivacyConfig, InstructionConfig, SFTConfig):
    """Settings of `DPSFTTrainer`: those of `PrivacyConfig`, of `trl.SFTConfig`, and other defaults of the latter.

    `gradient_accumulation_steps` follows from the largest draw of a step where it is left out.

    Raises:
        ConfigError: (a ValueError) a value out of range, settings that exclude each other, or a TRL setting with which
            rows would not be apart.
    """

    max_grad_norm: float = field(
        default=0.0,
        metadata={"help": "0 alone: clip_norm bounds each unit's gradient, and a second cut would rescale the noise."},
    )

    train_lora_a: bool = setting(
        True,
        "Train both matrices of the LoRA; false: A has orthonormal rows and stays, and B alone is trained. The noise "
        "grows with the root of the number of trained values.",
        identity=True,
        card=lambda args: not args.train_lora_a,
    )

    # a null of the private settings is not told
    nulls: ClassVar = InstructionConfig.nulls
    says: ClassVar = ("target_epsilon", "clip_norm")
    not_apart: ClassVar = (
        ("packing", (False,), "puts several rows into one sequence, whose gradients are not apart"),
        ("padding_free", (False,), "puts all rows into one sequence, whose gradients are not apart"),
        ("loss_type", ("nll",), "is of another loss than the mean over a row's own tokens"),
    )

    # the dataclass of private settings comes first, so that positions are those of TRL's config
    def __post_init__(self):
        InstructionConfig.__post_init__(self)

    @property
    def privacy(self) -> PrivacyConfig:
        """Return the private settings, which are among these."""
        return self

    def _read(self):
        PrivacyConfig.__post_init__(self)
        if not isinstance(self.train_lora_a, bool):
            raise ConfigError(f"train_lora_a is {self.train_lora_a!r}; it must be true or false.")
