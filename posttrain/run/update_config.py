"""Settings of how a step's gradients become an update, shared by every trainer: optimizer, agreement, sharpness."""

import math
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from posttrain.checks import check_choice
from posttrain.config.setting import setting
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.run import optimizer_args, optimizer_names, optimizers, refactoring
from posttrain.run.engines import sharding
from posttrain.run.init_kwargs import is_quantised

_HALVES = (torch.bfloat16, torch.float16)
# the share of weights that FSAM perturbs where none is set
_MASK_SHARE = 0.5
# the least and the largest length of SAM's move
_RADII = (1e-4, 10.0)


@dataclass
class UpdateConfig:
    """Adds to a config what every trainer here does between a step's gradients and its update."""

    optim: str = setting(
        TrainingArguments.default_optim,
        "Optimizer: one of transformers' names, torch.optim:NAME, pytorch_optimizer:NAME (the extra `optimizers`), or "
        "module:Class of your own, which needs --allow_code. Arguments in optim_args, such as "
        + " and ".join(f"{text} for {name}" for name, text in optimizer_args.EXAMPLES.items())
        + ".",
        identity=False,
        card=False,
    )
    gradient_agreement: float | None = setting(
        None,
        "Leave out of a step the micro-batches whose gradient has a larger cosine distance than this, in (0, 2], to "
        "the mean of those accepted before (GAF); 0.95 to 1 is usual. What a micro-batch is decides the result. "
        "Default: none is left out.",
        identity="update_rule",
        card=True,
    )
    sam_rho: float = setting(
        0.0,
        "Take the gradient at weights that are moved by so much against the loss (SAM), 0.01 to 0.1; two passes a "
        "step. 0: at the weights themselves.",
        identity="update_rule",
        card=True,
    )
    sam_mask: str = setting(
        "none",
        "Weights that SAM moves: none (all of them, without a mask) or fisher (FSAM: the largest squared gradients).",
        identity="update_rule",
        card=True,
    )
    sam_mask_share: float | None = setting(
        None,
        f"Share of the trained weights that `sam_mask: fisher` moves, in (0, 1]. Default: {_MASK_SHARE}.",
        identity="update_rule",
        card=True,
    )

    @property
    def update_rule(self) -> str | None:
        """Return by which rule a step's gradient is made; None for the plain sum at the weights themselves."""
        if self.gradient_agreement is not None:
            return f"gradient_agreement {self.gradient_agreement:g}"
        if not self.sam_rho:
            return None
        mask = "" if self.sam_mask == "none" else f", {self.sam_mask} {self.sam_mask_share:g}"
        return f"sam_rho {self.sam_rho:g}{mask}"

    @property
    def perturbs_weights(self) -> bool:
        """Return whether gradients are taken at moved weights."""
        return self.sam_rho > 0

    def _read_update(self) -> None:
        """Read these settings, before TRL's config reads the others. Raises ConfigError."""
        self.optim = optimizers.canonical(self.optim)
        tau, rho, share = self.gradient_agreement, self.sam_rho, self.sam_mask_share
        if tau is not None and not (_is_number(tau) and 0 < tau <= 2):
            raise ConfigError(
                f"gradient_agreement is {tau!r}; it must be a number above 0 and at most 2, the largest cosine "
                "distance, or null."
            )
        least, most = _RADII
        if not (_is_number(rho) and (rho == 0 or least <= rho <= most)):
            raise ConfigError(
                f"sam_rho is {rho!r}; it must be 0 or a number from {least:g} to {most:g}, the length of the move of "
                "all weights together: a shorter one is lost to rounding, and over a longer one the gradient does not "
                "tell how the loss changes. 0.01 to 0.1 is usual."
            )
        check_choice("sam_mask", self.sam_mask, ("none", "fisher"))
        if self.sam_mask != "none" and not rho:
            raise ExcludedSetting(
                f"sam_mask is {self.sam_mask} and sam_rho is 0, at which no weight is moved. Set sam_rho, or leave "
                "sam_mask out.",
                {"sam_mask": ("sam_rho",)},
            )
        if share is not None and not (_is_number(share) and 0 < share <= 1):
            raise ConfigError(f"sam_mask_share is {share!r}; it must be a number above 0 and at most 1.")
        if share is not None and self.sam_mask == "none":
            raise ExcludedSetting(
                f"sam_mask_share is {share} and sam_mask is none. Set `sam_mask: fisher`, or leave sam_mask_share out.",
                {"sam_mask_share": ("sam_mask", "sam_rho")},
            )
        if self.sam_mask == "fisher" and share is None:
            self.sam_mask_share = _MASK_SHARE
        if tau is not None and rho:
            raise ExcludedSetting(
                f"gradient_agreement is {tau} and sam_rho is {rho}; both change what a step's gradient is, and their "
                "order is defined nowhere. Leave one of them out.",
                {"gradient_agreement": ("sam_rho",), "sam_rho": ("gradient_agreement",)},
            )

    def _check_update(self) -> None:
        """Refuse these settings where TRL's have them change nothing, or cannot do with them. Raises ConfigError."""
        optimizers.check(self)
        refactoring.check_update(self)
        rules = {"gradient_agreement": self.gradient_agreement, "sam_rho": self.sam_rho or None}
        for name, value in rules.items():
            if value is not None:
                self._check_rule(name, value)
        micro_batches = self.gradient_accumulation_steps * self.world_size
        if self.gradient_agreement is not None and micro_batches == 1:
            raise ExcludedSetting(
                f"gradient_agreement is {self.gradient_agreement}, and a step is one micro-batch, which has no other "
                "to agree with. Set gradient_accumulation_steps above 1, or leave gradient_agreement out.",
                {"gradient_agreement": ("gradient_accumulation_steps",)},
            )

    def _check_rule(self, name: str, value: float) -> None:
        engine = sharding(self)
        if engine is not None:
            raise ConfigError(
                f"{name} is {value} under {engine}, which keeps a step's gradients in parts inside its engine. Use DDP "
                f"or one process, or leave {name} out."
            )
        if self.fp16:
            raise ExcludedSetting(
                f"{name} is {value} and fp16 is true, whose gradient scaler looks at one gradient a step. Set `bf16: "
                f"true` instead, or leave {name} out.",
                {name: ("fp16",), "fp16": (name,)},
            )
        if optimizer_names.steps_within_backward(str(getattr(self.optim, "value", self.optim))):
            raise ExcludedSetting(
                f"{name} is {value}, and optim {getattr(self.optim, 'value', self.optim)} moves weights within the "
                f"backward pass, before the step's gradient is there. Choose another optim, or leave {name} out.",
                {name: ("optim",), "optim": (name,)},
            )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_precision(trainer) -> None:
    """Refuse SAM on trained weights of 16 bits, which would lose its perturbation to rounding. Raises ConfigError."""
    if not trainer.args.perturbs_weights:
        return
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and parameter.dtype in _HALVES:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise _of_16_bits(trainer.args, name, kind, is_quantised(trainer.args, trainer.model.config))


def check_precision_to_come(args, peft_config, config) -> None:
    """Refuse by settings alone what `check_precision` would refuse of a model that a name stands for.

    Args:
        args: the trainer's config. peft_config: of a new adapter, or None. config: the model's.
    """
    if not args.perturbs_weights:
        return
    kwargs = args.model_init_kwargs or {}
    quantised = is_quantised(args, config)
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or "float32"
    dtype = (config.dtype if dtype == "auto" else dtype) or "float32"
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if quantised and peft_config is not None:
        raise _of_16_bits(args, "the adapter", "bfloat16", quantised)
    if peft_config is None and dtype in _HALVES:
        raise _of_16_bits(args, "the model", str(dtype).removeprefix("torch."), quantised)


def _of_16_bits(args, what: str, kind: str, quantised: bool) -> ConfigError:
    advice = (
        "Adapters on a base of 4 or 8 bits are bfloat16, as TRL casts them: leave load_in_4bit and load_in_8bit out, "
        "or sam_rho."
        if quantised
        else "Set `dtype: float32` for the model, or train a LoRA adapter, whose weights are float32."
    )
    return ConfigError(
        f"sam_rho is {args.sam_rho}, and {what} is trained in {kind}, where a perturbation of that size is lost to "
        f"rounding. {advice}"
    )
