"""GIFT-SW (arXiv 2408.15300): salient columns of linear layers train, the others have noise while they do.

The adapter is a LoRA whose A is frozen and holds a one in each row, at the row's column; B is the columns' change. So
what is saved is a plain LoRA, which PEFT loads and merges without this library.
"""

import copy
import math
from dataclasses import dataclass, field

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import _register_frozen_peft_weight
from torch import Tensor, nn

from posttrain.adapters.plain_lora import VARIANTS, MergesAsLora, SchemeConfig, variants_of
from posttrain.checks import check_choice
from posttrain.errors import ConfigError
from posttrain.mechanisms.noise import weights

NOISE = ("auto", "none", *weights.KINDS)
METRICS = ("sensitivity", "activation")
PAPER = {
    "title": "GIFT-SW: Gaussian noise Injected Fine-Tuning of Salient Weights for LLMs",
    "id": "2408.15300",
    "citation": """@misc{zhelnin2024gift,
    title  = {{GIFT-SW: Gaussian noise Injected Fine-Tuning of Salient Weights for LLMs}},
    author = {Maxim Zhelnin and Viktor Moskvoretskii and Egor Shvetsov and Egor Venediktov and Mariya Krylova and
              Aleksandr Zuev and Evgeny Burnaev},
    year   = 2024,
    eprint = {arXiv:2408.15300},
}""",
}
# subclasses of nn.Linear with a forward of their own that is its product and bias all the same
_AS_LINEAR = ("transformers.models.falcon.modeling_falcon.FalconLinear",)
# of LoraConfig: what has no meaning for columns, and its value
_NOT_OURS = VARIANTS | {
    "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None,
    "fan_in_fan_out": False,
}  # fmt: skip


@dataclass
class GiftSWConfig(SchemeConfig):
    """Config of a GIFT-SW adapter, for `peft_config=` or `get_peft_model`; the trainers here calibrate it.

    In another trainer call `posttrain.adapters.calibration.calibrate` first; the noise is of the trainers here alone.

    Args:
        r: salient columns of each layer.
        bits: of the rounding whose step gives the noise its size, 2 to 8.
        noise: on the other columns in the forward that is trained: gaussian, of half a step as its standard deviation;
            uniform, within half a step; none; auto, gaussian in NoisySFTTrainer and none elsewhere.
        metric: what columns are chosen by: sensitivity, the norm of what rounding leaves of a column times that of its
            inputs; activation, the largest input alone, as the published code has it.
        weight_norm, activation_norm: of the sensitivity, a number of 1 or more, or inf. activation_power: of the
            inputs' norm, finite. Published is the family; the defaults are a choice.
        calibration_rows: how many rows, the first ones, the inputs are measured on.

    Raises:
        ConfigError: (a ValueError) a value out of range, or a setting of LoRA that has no meaning for columns.
    """

    r: int = field(default=128, metadata={"help": "Salient columns of each layer."})
    lora_alpha: int | None = field(default=None, metadata={"help": "As many as the columns, which are not scaled."})
    bits: int = field(default=4, metadata={"help": "Bits of the rounding whose step gives the noise its size."})
    noise: str = field(default="auto", metadata={"help": "auto, none, gaussian or uniform."})
    metric: str = field(default="sensitivity", metadata={"help": "sensitivity or activation."})
    weight_norm: float = field(default=2.0, metadata={"help": "Norm of what rounding leaves of a column."})
    activation_norm: float = field(default=math.inf, metadata={"help": "Norm of a column's inputs."})
    activation_power: float = field(default=1.0, metadata={"help": "Exponent of that norm."})
    calibration_rows: int = field(default=128, metadata={"help": "Rows that the inputs are measured on."})

    called = "gift_sw"
    title = "a GIFT-SW adapter"
    own = (
        "bits", "noise", "metric", "weight_norm", "activation_norm", "activation_power", "calibration_rows",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        # columns by the path of their layer, once they are chosen
        self.salient: dict[str, list[int]] = {}
        self._check()
        self._register_custom_module({nn.Module: _layer})

    @property
    def what_r_is(self) -> str:
        return "the number of salient columns (r, lora_r)"

    def _check(self) -> None:
        for name, low, high in (("bits", 2, 8), ("calibration_rows", 1, math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                most = "on" if high == math.inf else f"to {high}"
                raise ConfigError(f"gift_sw: {name} is {value!r}; it must be a whole number from {low} {most}.")
        check_choice("gift_sw: noise", self.noise, NOISE)
        check_choice("gift_sw: metric", self.metric, METRICS)
        for name, low in (("weight_norm", 1), ("activation_norm", 1), ("activation_power", 0)):
            value = getattr(self, name)
            most = 1e30 if name == "activation_power" else math.inf
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= most:
                told = f"from {low} to {most:g}" if most < math.inf else f"of {low} or more, or inf"
                raise ConfigError(f"gift_sw: {name} is {value!r}; it must be a number {told}.")
        if self.lora_alpha != self.r:
            raise ConfigError(
                f"lora_alpha is {self.lora_alpha} with {self.r} salient columns; GIFT-SW does not scale the columns' "
                "change. Leave lora_alpha out."
            )
        for name, neutral in _NOT_OURS.items():
            value = getattr(self, name, neutral)
            if value and value != neutral or (name == "init_lora_weights" and value is not True):
                why = "it trains columns of the weights as they are, equally many in each layer"
                if name == "target_parameters":
                    why = "fused experts are tensors of three dimensions, whose columns are not one layer's"
                raise ConfigError(f"{name} is {value!r} with adapter gift_sw: {why}. Leave {name} out.")

    @property
    def scheme(self) -> str:
        """The scheme in words, which a resumed run must share."""
        chosen = self.metric
        if chosen == "sensitivity":
            chosen += f" {self.weight_norm:g} {self.activation_norm:g} {self.activation_power:g}"
        return f"gift_sw {self.bits} bits, {self.noise} noise, {chosen} of {self.calibration_rows} rows"

    @property
    def paper(self) -> dict:
        """The paper, for a card."""
        return PAPER

    def in_card(self, trainer) -> list[tuple[str, object]]:
        """Return what a card tells of the adapter, by name."""
        share = file_share(trainer.accelerator.unwrap_model(trainer.model))
        noise = trainer.weight_noise_kind
        return [
            ("adapter", "gift_sw"),
            ("salient columns of each layer", self.r),
            ("chosen by", f"{self.metric} on {self.calibration_rows} rows, {self.bits} bits"),
            ("noise on the other columns", noise if noise == "none" else f"{noise}, by the step of {self.bits} bits"),
            ("share of the adapter's file that names the columns", f"{share:.0%}"),
        ]

    def placed(self, model, adapter: str) -> list:
        return layers_of(model, adapter)

    def beside(self) -> dict:
        return {"columns": self.salient}

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        config = super().from_pretrained(folder, **kwargs)
        config.salient = cls.read_saved(folder)["columns"]
        return config

    @classmethod
    def is_side_file(cls, found: dict) -> bool:
        columns = found.get("columns")
        return isinstance(columns, dict) and all(
            isinstance(ids, list) and all(isinstance(one, int) and one >= 0 for one in ids) for ids in columns.values()
        )

    @classmethod
    def told_beside(cls) -> str:
        return ", and columns"


class GiftSWVariant(MergesAsLora):
    """The adapter of one layer: B times the salient inputs.

    Attributes:
        columns: (r,), their numbers in order; None until they are chosen.
        rows: how large the noise of the other columns is; None until that is known.
    """

    def __init__(self) -> None:
        self.columns: Tensor | None = None
        self.rows: weights.RowNoise | None = None

    def init(self, module, adapter_name: str, config=None, target_name: str = "", **kwargs) -> None:
        _register_frozen_peft_weight(module, adapter_name, "lora_A")
        with torch.no_grad():
            module.lora_A[adapter_name].weight.zero_()
        known = getattr(config, "salient", {}).get(target_name)
        if known is not None:
            self.columns = torch.tensor(known)

    def forward(self, module, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        if self.columns is None:
            raise ConfigError(
                "a GIFT-SW layer is forwarded, and its salient columns are not chosen. The trainers of posttrain do it "
                "when they are built; elsewhere call posttrain.adapters.calibration.calibrate(model, sequences) first."
            )
        if self.columns.device != x.device:
            self.columns = self.columns.to(x.device)
        change = module.lora_B[active_adapter](x.index_select(-1, self.columns))
        scale = module.scaling[active_adapter]
        return result + (change if scale == 1 else change * scale)


class GiftSWLinear(Linear):
    """A LoRA layer whose base has noise where `weight_noise` is on, and its adapter is neither off nor merged."""

    weight_noise: weights.WeightNoise | None = None

    def resolve_lora_variant(self, *, config, **kwargs):
        if isinstance(config, GiftSWConfig):
            return GiftSWVariant()
        return super().resolve_lora_variant(config=config, **kwargs)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        noise = self.weight_noise
        if noise is None or not noise.is_on or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        active = (self.lora_variant.get(name) for name in self.active_adapters)
        rows = next((one.rows for one in active if isinstance(one, GiftSWVariant)), None)
        if rows is None:
            return super().forward(x, *args, **kwargs)
        with weights.added_to(self.get_base_layer(), rows, noise):
            return super().forward(x, *args, **kwargs)


def _layer(target, adapter_name: str, config: GiftSWConfig, parameter_name=None, **kwargs) -> nn.Module:
    """Make the layer that PEFT puts in a target's place; ConfigError for one that has no columns to choose.

    Of all-linear such a one stays as it is.
    """
    name = kwargs.get("target_name") or type(target).__name__
    reason = None
    if kwargs.get("loaded_in_4bit") or kwargs.get("loaded_in_8bit") or _is_quantised(target):
        reason = (
            "is quantised: its weights would have to be unpacked for each draw of noise, and the adapter alone would "
            "not hold the base. Load the base unquantised"
        )
    elif type(target).__name__ == "Conv1D":
        reason = "is a Conv1D, whose weight is transposed: its columns are outputs. Use LoRA for this model"
    elif not _is_linear(target):
        if config._takes_what_fits:
            config.leave_out(name, target, parameter_name is not None)
            return target
        reason = f"is a {type(target).__name__}, and GIFT-SW is for linear layers. Leave it out of target_modules"
    if reason:
        raise ConfigError(f"adapter gift_sw: {name} {reason}.")
    if config.r >= target.in_features:
        raise ConfigError(
            f"adapter gift_sw: {config.r} salient columns (lora_r), and {name} has {target.in_features} in all. Give "
            "fewer, or train the whole model."
        )
    # PEFT notes in the config what it finds out of a layer
    plain = copy.copy(config)
    plain._custom_modules = None
    return GiftSWLinear(target, adapter_name, config=plain, **kwargs)


def _is_linear(target) -> bool:
    kind = type(target)
    plain = kind.forward is nn.Linear.forward or f"{kind.__module__}.{kind.__qualname__}" in _AS_LINEAR
    return isinstance(target, nn.Linear) and plain


def _is_quantised(target) -> bool:
    weight = getattr(target, "weight", None)
    packed = weight is not None and not (weight.is_floating_point() and type(weight.data) is Tensor)
    return packed or type(target).__module__.startswith(("bitsandbytes", "torchao", "gptqmodel", "hqq"))


def layers_of(model, adapter: str | None = None) -> list[tuple[str, GiftSWLinear, GiftSWVariant, str]]:
    """Return path, layer, variant and adapter's name of each GIFT-SW adapter of a model, in the model's order."""
    return variants_of(model, GiftSWVariant, adapter)


def file_share(model, adapter: str = "default") -> float:
    """Return which share of the numbers of the saved adapter is A, which holds nothing but the columns' places."""
    sizes = [(layer.in_features * layer.r[name], layer.out_features * layer.r[name])
             for _, layer, _, name in layers_of(model, adapter)]  # fmt: skip
    places = sum(size for size, _ in sizes)
    return places / max(places + sum(size for _, size in sizes), 1)
