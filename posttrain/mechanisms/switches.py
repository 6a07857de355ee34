"""Switches of a model that a pass turns off and back on: its adapter, and its gradient checkpointing."""

import contextlib

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from trl.trainer.utils import use_adapter


class Switches:
    """Turns a model's adapter and its gradient checkpointing off and back on, on modules that are found once.

    Upstream's switches walk all modules of the model each time. Beside that, checkpointing that is switched on anew
    leaves one more hook on the embeddings, and an adapter that is switched on anew has the `requires_grad` that PEFT
    gives it. Here no hook, no `requires_grad` and no function of checkpointing is touched.
    """

    def __init__(self, model) -> None:
        """Take the model as it is without DDP or an engine around it; `model` may be a PeftModel."""
        self.model = model
        self._checkpointed, self._adapted, self._adapters, self._uncast = None, None, None, None

    @contextlib.contextmanager
    def without_checkpointing(self):
        """Keep activations in forwards inside, which have no use for a recomputation."""
        if self._checkpointed is None:
            self._checkpointed = [module for module in self.model.modules() if _may_recompute(module)]
        then = [module for module in self._checkpointed if module.gradient_checkpointing]
        for module in then:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for module in then:
                module.gradient_checkpointing = True

    @contextlib.contextmanager
    def adapter(self, name: str | None):
        """Forward with the adapter called `name` inside; with None, with none: the base alone."""
        layers = self._adapter_layers()
        # a merged one is taken out of the weights, which PEFT does
        if layers is None or any(layer.merged_adapters for layer in layers):
            with use_adapter(self.model, name):
                yield
            return
        attribute, value = ("_disable_adapters", True) if name is None else ("_active_adapter", [name])
        then = [getattr(layer, attribute) for layer in layers]
        told = self._tell(name)
        for layer in layers:
            setattr(layer, attribute, value)
        try:
            yield
        finally:
            for layer, before in zip(layers, then, strict=True):
                setattr(layer, attribute, before)
            for holder, own, before in told:
                setattr(holder, own, before)

    @contextlib.contextmanager
    def without_casts(self):
        """Give a LoRA its input as it is, in forwards under autocast and their backward.

        PEFT casts it to the adapter's fp32, and autocast back again for the product: the same numbers. It is done where
        that is known, in layers of plain LoRA without dropout, which would draw otherwise in another dtype.
        """
        if self._uncast is None:
            layers = self._adapter_layers() or []
            drops = any(dropout.p > 0 for layer in layers for dropout in _dropouts(layer))
            varies = any(layer.lora_variant for layer in layers)
            self._uncast = [] if drops or varies else layers
        for layer in self._uncast:
            layer.cast_input_dtype_enabled = False
        try:
            yield
        finally:
            for layer in self._uncast:
                layer.cast_input_dtype_enabled = True

    def _tell(self, name: str | None) -> list[tuple]:
        """Tell the PeftModel and the tuner in it what the layers forward; returns what they held before."""
        if name is None:
            places = [(self.model, "_adapters_disabled", True)]
        else:
            places = [(holder, "active_adapter", name) for holder in (self.model, self.model.base_model)]
        then = [(holder, attribute, getattr(holder, attribute)) for holder, attribute, _ in places]
        for holder, attribute, value in places:
            setattr(holder, attribute, value)
        return then

    def _adapter_layers(self) -> list | None:
        """Return the layers of adapters that are LoRA alone; None for others, which PEFT switches."""
        names = tuple(self.model.peft_config)
        if self._adapters != names:
            self._adapters, self._uncast, parts = names, None, list(self.model.modules())
            layers = [part for part in parts if isinstance(part, BaseTunerLayer)]
            are_lora = all(isinstance(layer, LoraLayer) for layer in layers)
            # modules that are saved whole, or tokens, have switches of their own; of biases PEFT warns
            wrapped = any(isinstance(part, AuxiliaryTrainingWrapper) for part in parts)
            plain = all(
                not config.is_prompt_learning and getattr(config, "bias", "none") == "none"
                for config in self.model.peft_config.values()
            )
            self._adapted = layers if layers and are_lora and plain and not wrapped else None
        return self._adapted


def _dropouts(layer) -> list:
    return [dropout for dropout in layer.lora_dropout.values() if hasattr(dropout, "p")]


def _may_recompute(module) -> bool:
    # a wrapper hands on what the module inside has
    return "gradient_checkpointing" in vars(module) or hasattr(type(module), "gradient_checkpointing")
