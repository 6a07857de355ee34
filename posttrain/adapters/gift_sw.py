"""GIFT-SW (arXiv 2408.15300): salient columns of linear layers train, the others have noise while they do.

The adapter is a LoRA whose A is frozen and holds a one in each row, at the row's column; B is the columns' change. So
what is saved is a plain LoRA, which PEFT loads and merges without this library.
"""

import copy
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraVariant
from peft.tuners.lora.variants import _register_frozen_peft_weight
from torch import Tensor, nn

from posttrain.adapters import SIDE_FILE
from posttrain.checks import check_choice
from posttrain.errors import ConfigError
from posttrain.mechanisms.noise import weights
from posttrain.saved import read_json

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
_NOT_OURS = {
    "use_rslora": False, "use_dora": False, "lora_bias": False, "lora_dropout": 0.0, "init_lora_weights": True,
    "rank_pattern": {}, "alpha_pattern": {}, "target_parameters": None, "layer_replication": None,
    "fan_in_fan_out": False, "alora_invocation_tokens": None, "use_bdlora": None, "arrow_config": None,
    "velora_config": None, "monteclora_config": None, "kasa_config": None, "megatron_config": None,
}  # fmt: skip
_OWN = (
    "bits", "noise", "metric", "weight_norm", "activation_norm", "activation_power", "calibration_rows",
)  # fmt: skip


@dataclass
class GiftSWConfig(LoraConfig):
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

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"the number of salient columns (r, lora_r) is {self.r!r}; it must be 1 or more.")
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        super().__post_init__()
        # columns by the path of their layer, once they are chosen
        self.salient: dict[str, list[int]] = {}
        # PEFT writes names in the place of all-linear
        self._takes_what_fits = isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"
        # of each module that was left out of all-linear, by its path: its class, and whether a tensor of it was named
        self.left_out: dict[str, tuple[str, bool]] = {}
        self._check()
        self._register_custom_module({nn.Module: _layer})

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

    def leave_out(self, path: str, module: nn.Module, is_parameter: bool) -> None:
        """Note a module of all-linear without a GIFT-SW adapter. `is_parameter`: the path is that of a tensor in it."""
        if is_parameter:
            path = path.rpartition(".")[0]
            # what PEFT has made of all-linear for a mixture's experts
            self.target_parameters, self.rank_pattern, self.alpha_pattern = None, {}, {}
        self.left_out[path] = type(module).__name__, is_parameter

    def what_was_left_out(self) -> str:
        """Return the modules that were left out of all-linear in words, by class; empty where none was."""
        counts = Counter(kind for kind, _ in self.left_out.values())
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        fused = any(is_parameter for _, is_parameter in self.left_out.values())
        return f"{told}, and linear layers that are named like the experts of a mixture" if fused else told

    def check_placed(self, model, adapter: str = "default") -> None:
        """Raise ConfigError where the adapter is on no layer of a PeftModel, as all of all-linear were left out."""
        if self.left_out and not layers_of(model, adapter):
            raise ConfigError(
                "adapter gift_sw: all-linear has no plain linear layer in this model, which it could take "
                f"({self.what_was_left_out()}). Use LoRA for this model."
            )

    def to_dict(self) -> dict:
        """Return the config of the plain LoRA that is saved."""
        found = {name: value for name, value in super().to_dict().items() if name not in _OWN}
        paths = sorted(path for path, (_, is_parameter) in self.left_out.items() if not is_parameter)
        before = found["exclude_modules"]
        if paths and isinstance(before, str):
            found["exclude_modules"] = "|".join([f"(?:{before})", *map(re.escape, paths)])
        elif paths:
            found["exclude_modules"] = sorted({*(before or ()), *paths})
        return found

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save the config of a plain LoRA, and beside it `posttrain_adapter.json`: settings and salient columns."""
        super().save_pretrained(save_directory, **kwargs)
        found = {"scheme": "gift_sw"} | {name: getattr(self, name) for name in _OWN}
        # JSON has no infinity
        found |= {name: "inf" for name in _OWN if found[name] == math.inf}
        (Path(save_directory) / SIDE_FILE).write_text(json.dumps(found | {"columns": self.salient}), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """Read the config of a saved adapter; give it as `config=` to `PeftModel.from_pretrained` to train it on.

        Raises ConfigError where the folder has no file of this library beside the adapter.
        """
        found = read_saved(folder)
        if found is None:
            raise ConfigError(f"{folder} has no {SIDE_FILE} of a GIFT-SW adapter; use peft.LoraConfig for it.")
        plain = LoraConfig.from_pretrained(folder, **kwargs)
        names = cls.__dataclass_fields__.keys() - set(_OWN)
        given = {name: getattr(plain, name) for name in names if name in LoraConfig.__dataclass_fields__}
        config = cls(**{n: v for n, v in given.items() if cls.__dataclass_fields__[n].init}, **found["settings"])
        config.salient = found["columns"]
        return config


def read_saved(folder) -> dict | None:
    """Return settings and columns of a saved adapter: {"settings": ..., "columns": ...}; None where there is no file.

    Raises ConfigError for a file of another form.
    """
    path = Path(folder) / SIDE_FILE
    if not path.is_file():
        return None
    found = read_json(path)
    columns = found.get("columns") if isinstance(found, dict) else None
    is_table = isinstance(columns, dict) and all(
        isinstance(ids, list) and all(isinstance(one, int) and one >= 0 for one in ids) for ids in columns.values()
    )
    if not is_table or found.get("scheme") != "gift_sw":
        raise ConfigError(f"{path} is none of a GIFT-SW adapter: it must have the scheme gift_sw, and columns.")
    settings = {name: math.inf if found[name] == "inf" else found[name] for name in _OWN if name in found}
    return {"settings": settings, "columns": columns}


class GiftSWVariant(LoraVariant):
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

    def merge_safe(self, module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def unmerge(self, module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


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
    found = []
    for path, layer in model.named_modules():
        for name, variant in getattr(layer, "lora_variant", {}).items():
            if isinstance(variant, GiftSWVariant) and adapter in (None, name):
                found.append((path.removeprefix("base_model.model."), layer, variant, name))
    return found


def file_share(model, adapter: str = "default") -> float:
    """Return which share of the numbers of the saved adapter is A, which holds nothing but the columns' places."""
    sizes = [(layer.in_features * layer.r[name], layer.out_features * layer.r[name])
             for _, layer, _, name in layers_of(model, adapter)]  # fmt: skip
    places = sum(size for size, _ in sizes)
    return places / max(places + sum(size for _, size in sizes), 1)
