"""ALLoRA (arXiv 2410.09692): a LoRA without alpha and dropout, whose rows have rates by the norms of their changes.

The forward is a LoRA's with scaling 1, bit for bit; the gradients of A and B are not. What is saved is a plain LoRA,
which PEFT loads and merges without this library.
"""

import copy
import inspect
from dataclasses import dataclass, field

from peft import LoraConfig, LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from posttrain.adapters.plain_lora import VARIANTS, MergesAsLora, SchemeConfig, variants_of
from posttrain.checks import check_choice, check_holdable, plain, shorten
from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.mechanisms.scaled_rows import become_scaled, scaled_rows, trains
from posttrain.objectives.row_scales import LEAST_ETA as _LEAST
from posttrain.objectives.row_scales import MOST_ETA as _MOST
from posttrain.objectives.row_scales import allora_scale as allora_scale

FORMS = ("gradient", "update")
PAPER = {
    "title": "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
    "id": "2410.09692",
    "citation": """@misc{huang2024allora,
    title  = {{ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws}},
    author = {Hai Huang and Randall Balestriero},
    year   = 2024,
    eprint = {arXiv:2410.09692},
}""",
}
# of LoraConfig, what trains something without factors, or makes another start or other layers: its neutral value
_NOT_OURS = VARIANTS | {
    "bias": "none", "layer_replication": None, "eva_config": None, "corda_config": None, "lora_ga_config": None,
    "loftq_config": {}, "ensure_weight_tying": False,
}  # fmt: skip
_START = "its B begins at zero beside an untouched base, and A is random"
_WHY = {
    "bias": "its factors are of the product B A, and biases of the base would have none",
    "layer_replication": "it is for the layers that the model has",
    "ensure_weight_tying": "it is for linear layers alone, which share no weight",
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config", "loftq_config"), _START),
    "lora_dropout": "it does without dropout",
    "lora_bias": "its factors are of the product B A, and a bias would have none",
    "use_rslora": "it has no scaling; eta sets the size of its rates",
    "target_parameters": "fused experts are tensors of three dimensions, and it is for linear layers",
}


@dataclass
class ALLoRAConfig(SchemeConfig):
    """Config of an ALLoRA adapter, for `peft_config=` or `get_peft_model`, of any library's trainer.

    Layers are PEFT's own, of quantised bases too. An adapter that `add_adapter` or `load_adapter` puts on layers that
    have one already comes out as a plain LoRA: call `apply_allora` then, which the trainers here do by themselves.

    Args:
        eta: the factor of a row that has not changed, which is the largest: the rate there is eta times the learning
            rate. Published are 1, the square root of 2, and 2.
        form: what a row's factor multiplies. gradient: the gradients of A and B, as published, which Adam nearly
            undoes. update: the optimizer's update of B, the gradients being LoRA's; of the trainers here, or by
            `posttrain.adapters.scaled_updates.ScaledUpdates`.

    Raises:
        ConfigError: (a ValueError) eta out of range, or a setting of LoRA that ALLoRA is there to replace, or that
            makes another product than B A. When the adapter is made: a layer that is none of PEFT's linear ones, or
            whose scaling is not 1.
    """

    lora_alpha: int | None = field(default=None, metadata={"help": "As large as the rank: there is no scaling."})
    eta: float = field(default=2.0, metadata={"help": "The factor of a row that has not changed."})
    form: str = field(default="gradient", metadata={"help": "gradient or update."})

    called = "allora"
    title = "an ALLoRA adapter"
    own = ("eta", "form")

    def __post_init__(self):
        # PEFT empties it where it has no effect
        loftq = self.loftq_config
        super().__post_init__()
        self.loftq_config = loftq
        self.eta = plain(self.eta)
        # shared by the variants of all layers
        self.updates = Updates()
        self._check()
        self._register_custom_module({nn.Module: _layer})

    def _check(self) -> None:
        check_holdable("allora: eta", self.eta)
        number = isinstance(self.eta, int | float) and not isinstance(self.eta, bool)
        if not number or not _LEAST <= self.eta <= _MOST:
            raise ConfigError(
                f"allora: eta is {shorten(self.eta)}; it must be a number from {_LEAST:g} to {_MOST:g} (2 by default)."
            )
        check_choice("allora: form", self.form, FORMS)
        if self.lora_alpha != self.r and not self.alpha_pattern:
            raise ConfigError(
                f"lora_alpha is {self.lora_alpha} with rank {self.r} and adapter allora, which has no scaling; eta "
                "sets the size of its rates. Leave lora_alpha out."
            )
        for name, neutral in _NOT_OURS.items():
            value = getattr(self, name, neutral)
            if value and value != neutral:
                why = _WHY.get(name, "its factors are of the product B A alone")
                raise ConfigError(f"{name} is {value!r} with adapter allora: {why}. Leave {name} out.")
        if self.init_lora_weights is not True and self.init_lora_weights != "gaussian":
            raise ConfigError(
                f"init_lora_weights is {self.init_lora_weights!r} with adapter allora, whose B begins at zero beside "
                "an untouched base. Leave init_lora_weights out, or set it to 'gaussian'."
            )

    @classmethod
    def is_side_file(cls, found: dict) -> bool:
        eta = found.get("eta")
        is_number = isinstance(eta, int | float) and not isinstance(eta, bool)
        return is_number and _LEAST <= eta <= _MOST and found.get("form") in FORMS

    @classmethod
    def told_beside(cls) -> str:
        return f", an eta from {_LEAST:g} to {_MOST:g} and a form ({' or '.join(FORMS)})"

    @property
    def scheme(self) -> str:
        return f"allora eta {float(self.eta)!r}, {self.form} form"

    @property
    def may_be_refactored(self) -> bool:
        # a row's factor hangs on B A alone, and multiplies rows of gradients, which turn by their columns
        return self.form == "gradient"

    @property
    def paper(self) -> dict:
        return PAPER

    def in_card(self, trainer) -> list[tuple[str, object]]:
        scaled = {"gradient": "the gradients of A and B", "update": "the optimizer's update of B"}
        return [("adapter", "allora"), ("eta", self.eta), ("a row's factor multiplies", scaled[self.form])]

    def placed(self, model, adapter: str) -> list:
        return layers_of(model, adapter)

    def attach(self, model, adapter: str) -> None:
        found = []
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer) and (adapter in layer.lora_A or adapter in layer.lora_embedding_A):
                _check_layer(layer, adapter, path.removeprefix("base_model.model."))
                known = layer.lora_variant.get(adapter)
                found += [] if known is not None and known.config_is(self) else [layer]
        for layer in found:
            _take(layer, adapter, self)


@dataclass
class Updates:
    """Whether an optimizer's updates are scaled, and whether it was said that they are not."""

    are_scaled: bool = False
    is_told: bool = False


class ALLoRAVariant(MergesAsLora):
    """The adapter of one layer: B A, and what its gradients are."""

    def __init__(self, config: ALLoRAConfig) -> None:
        self.eta, self.form, self.updates = config.eta, config.form, config.updates

    def init(self, module, adapter_name: str, **kwargs) -> None:
        """Leave a layer's matrices as PEFT has made them."""

    def config_is(self, config: ALLoRAConfig) -> bool:
        """Return whether the variant is one of this config."""
        return (self.eta, self.form) == (config.eta, config.form) and self.updates is config.updates

    def forward(self, module, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        A, B, scaling = module.lora_A[active_adapter], module.lora_B[active_adapter], module.scaling[active_adapter]
        change = scaled_rows(x, A, B, self.eta) if self.form == "gradient" else B(A(x))
        if self.form == "update" and change.requires_grad and trains(B):
            self._tell_of_plain_updates()
        if scaling == 1:
            return result + change
        if change.requires_grad and trains(B):
            raise ConfigError(
                f"adapter allora is trained with a scaling of {scaling:g}, which was set after it was made; it has "
                "none. Set it back to 1."
            )
        return result + change * scaling

    def _tell_of_plain_updates(self) -> None:
        if not (self.updates.are_scaled or self.updates.is_told):
            self.updates.is_told = True
            get_logger().warning(
                "adapter allora: its form is update, and nothing scales the updates of an optimizer here, so that a "
                "plain LoRA is trained. Use a trainer of posttrain, or call "
                "posttrain.adapters.scaled_updates.ScaledUpdates(model, optimizer) before the first step."
            )


def apply_allora(model, eta: float = 2.0, adapter_name: str = "default", form: str = "gradient"):
    """Make a plain LoRA on a PeftModel an ALLoRA adapter, wherever it was made or loaded.

    Its config becomes an `ALLoRAConfig`, so that it is saved, resumed and described as one.

    Args:
        model: a PeftModel, which is changed. eta, form: as in `ALLoRAConfig`.
        adapter_name: of the adapter, whose lora_alpha is its rank, and which has no dropout.

    Returns:
        the model.

    Raises:
        ConfigError: no such adapter, one on no linear layer, or one that could not be made with an `ALLoRAConfig`.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        raise ConfigError(f"apply_allora takes a PeftModel, not a {type(model).__name__}; see peft.get_peft_model.")
    before = configs.get(adapter_name)
    if before is None:
        raise ConfigError(f"the model has no adapter {adapter_name!r}; it has {', '.join(map(repr, configs))}.")
    if not isinstance(before, LoraConfig) or isinstance(before, SchemeConfig) and not isinstance(before, ALLoRAConfig):
        what = f"of the scheme {before.called}" if isinstance(before, SchemeConfig) else f"a {type(before).__name__}"
        raise ConfigError(f"the adapter {adapter_name!r} is {what}; ALLoRA is made of a plain LoRA.")
    config = ALLoRAConfig.of_plain(before, eta=eta, form=form)
    config.left_out = dict(getattr(before, "left_out", {}))
    config.attach(model, adapter_name)
    if not layers_of(model, adapter_name):
        raise ConfigError(f"the adapter {adapter_name!r} is on no linear layer, so ALLoRA would do nothing.")
    configs[adapter_name] = config
    return model


def layers_of(model, adapter: str | None = None) -> list[tuple[str, LoraLayer, ALLoRAVariant, str]]:
    """Return path, layer, variant and adapter's name of each ALLoRA adapter of a model, in the model's order."""
    return variants_of(model, ALLoRAVariant, adapter)


def _layer(target, adapter_name: str, config: ALLoRAConfig, parameter_name=None, **kwargs) -> nn.Module:
    """Make the layer that PEFT would put in a target's place, with ALLoRA's gradients; ConfigError where it has none.

    Tensors that PEFT takes for all-linear beside layers, of a mixture's experts, stay as they are.
    """
    name = kwargs.get("target_name") or type(target).__name__
    if parameter_name is not None:
        if config._takes_what_fits:
            config.leave_out(name, target, is_parameter=True)
            return target
        raise ConfigError(
            f"adapter allora: {name} is a tensor of {type(target).__name__}, and ALLoRA is for linear layers. Leave it "
            "out of target_modules."
        )
    # PEFT notes in the config what it finds out of a layer
    own = copy.copy(config)
    own._custom_modules = None
    layer = LoraModel._create_new_module(own, adapter_name, target, **kwargs)
    config.fan_in_fan_out = own.fan_in_fan_out
    _check_layer(layer, adapter_name, name)
    _take(layer, adapter_name, config)
    return layer


def _take(layer, adapter: str, config: ALLoRAConfig) -> None:
    """Make a layer's adapter ALLoRA's."""
    become_scaled(layer.lora_A[adapter], layer.lora_B[adapter])
    layer.lora_variant[adapter] = ALLoRAVariant(config)


def _check_layer(layer, adapter: str, name: str) -> None:
    """Raise ConfigError for a layer on which an adapter cannot be ALLoRA's."""
    base, kind = type(layer.get_base_layer()).__name__, type(layer)
    reason = None
    other = layer.lora_variant.get(adapter)
    if not (adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear)):
        reason = f"is a {base}, and ALLoRA is for linear layers. Leave it out of target_modules"
    elif not _asks_its_variant(kind):
        reason = (
            f"is a {base}, of which PEFT makes a {kind.__name__}, which multiplies by its matrices itself: it would be "
            "trained as a plain LoRA. Leave it out of target_modules, or use LoRA"
        )
    elif other is not None and not isinstance(other, ALLoRAVariant):
        reason = f"has a {type(other).__name__} already, and ALLoRA is made of a plain LoRA. Use one"
    elif layer.scaling[adapter] != 1:
        reason = (
            f"has a scaling of {layer.scaling[adapter]:g} (alpha over rank), and ALLoRA has none. Give what is in "
            "rank_pattern the same value in alpha_pattern, or leave rank_pattern, alpha_pattern and lora_alpha out"
        )
    elif getattr(layer.lora_dropout[adapter], "p", 0.0) > 0:
        reason = f"drops out {layer.lora_dropout[adapter].p:g} of its inputs, and ALLoRA does without. Set it to 0"
    elif layer.lora_bias.get(adapter):
        reason = "has a bias in its adapter, which would have no factor. Leave lora_bias out"
    if reason:
        raise ConfigError(f"adapter allora: {name} {reason}.")


def _asks_its_variant(kind: type) -> bool:
    """Return whether a class of PEFT's layers has its variant compute the forward."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "lora_variant" in code.co_names
