"""Settings of the private trainer."""

from dataclasses import dataclass, field
from typing import ClassVar

from trl import SFTConfig

from posttrain.config.setting import setting
from posttrain.errors import ConfigError
from posttrain.privacy.config import PrivacyConfig
from posttrain.run import private_settings
from posttrain.run.engines import sharding
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

    # the dataclass of private settings comes first, so that positions are those of TRL's config
    def __post_init__(self):
        InstructionConfig.__post_init__(self)

    def _read(self):
        PrivacyConfig.__post_init__(self)
        if not isinstance(self.train_lora_a, bool):
            raise ConfigError(f"train_lora_a is {self.train_lora_a!r}; it must be true or false.")
        for name, neutral, why in (
            ("max_grad_norm", (0, 0.0), "would cut the noisy gradient, its noise and all; clip_norm cuts each unit's"),
            ("packing", (False,), "puts several rows into one sequence, whose gradients are not apart"),
            ("padding_free", (False,), "puts all rows into one sequence, whose gradients are not apart"),
            ("loss_type", ("nll",), "is of another loss than the mean over a row's own tokens"),
            ("label_smoothing_factor", (0, 0.0, None), "takes a mean over the tokens of all rows"),
            ("fp16", (False, None), "scales gradients by what the rows before them were; use bf16"),
            ("torch_compile", (False, None), "would compile past the layers that gradients of rows are taken in"),
            ("auto_find_batch_size", (False,), "takes steps again"),
            ("load_best_model_at_end", (False,), "chooses weights by an evaluation, which the promise does not cover"),
            ("gradient_agreement", (None,), "leaves out micro-batches by what their rows are"),
            ("sam_rho", (0, 0.0), "moves the weights by a gradient without noise"),
            ("deepspeed", (None,), "reduces gradients before they are clipped"),
            ("dataloader_drop_last", (False,), "has no meaning for rows that are drawn"),
            ("train_sampling_strategy", ("random",), "has no meaning for rows that are drawn"),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in neutral:
                raise ConfigError(f"{name} is {value}, which {why}. Leave {name} out in a private run.")
        engine = sharding(self)
        if engine:
            raise ConfigError(
                f"the run is launched under {engine}, which reduces gradients before they are clipped. Launch one "
                "process, or several without it (configs/accelerate/ddp.yaml)."
            )
        self._check_followers()

    def _check_followers(self) -> None:
        """Refuse what follows an evaluation of private rows, and optimizers that update before a step is whole."""
        follows = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        if follows in ("reduce_lr_on_plateau", "greedy"):
            raise ConfigError(
                f"lr_scheduler_type is {follows}, which follows losses that the promise does not cover. Use another, "
                "such as constant or cosine."
            )
        if str(getattr(self.save_strategy, "value", self.save_strategy)) == "best":
            raise ConfigError(
                "save_strategy is best, which keeps weights by an evaluation that the promise does not cover. Use "
                "steps or epoch."
            )
        optim = str(getattr(self.optim, "value", self.optim))
        if optim in ("lomo", "adalomo") or "layerwise" in optim:
            raise ConfigError(
                f"optim is {optim}, which updates weights inside the backward, before a step is clipped and has its "
                "noise. Use another, such as adamw_torch."
            )

    def check_model(self, model, config, peft_config=None, eval_dataset=None) -> None:
        private_settings.check_model(self, model, config, peft_config)

    @property
    def columns_beside(self) -> tuple[str, ...]:
        return () if self.privacy_unit_column is None else (self.privacy_unit_column,)

    @property
    def known_later(self) -> tuple[str, ...]:
        return () if "gradient_accumulation_steps" in self._written else ("gradient_accumulation_steps",)

    @property
    def draws_rows(self) -> bool:
        return True

    def planned(self, dataset):
        """Plan the steps on tokenised rows; `gradient_accumulation_steps` follows from it where it was left out."""
        return private_settings.planned(self, self, dataset)

    def units_of(self, dataset):
        """Return the rows of each unit of privacy in a data set; raises as `private_settings.units_of` does."""
        return private_settings.units_of(self, dataset)
