"""ALLoRA's update form: an optimizer's update of B, row by row, instead of the gradients that it is made from."""

import weakref

import torch
from peft import PeftModel

from posttrain.adapters.allora import ALLoRAConfig, layers_of
from posttrain.errors import ConfigError
from posttrain.objectives.row_scales import gram, scale_of

# by optimizer, the matrices whose updates are scaled
_SCALED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class ScaledUpdates:
    """Scales what each step of an optimizer does to the rows of B, by the factors of the weights before the step.

        B <- B + S (B' - B)

    B' being what the optimizer makes of B by a plain LoRA's gradients, whatever it divides them by. A is updated as it
    is. It stands on the hooks that every optimizer of torch has around its step, until `remove`.

    Not in the paper. Not for weights in parts, as of DeepSpeed and FSDP.

    Attributes:
        steps: how many steps it has scaled.
    """

    def __init__(self, model: PeftModel, optimizer: torch.optim.Optimizer, adapter_name: str = "default") -> None:
        """Begin to scale the steps of an optimizer.

        Args:
            model: with an adapter whose `ALLoRAConfig` has the form update. optimizer: of its parameters.

        Raises:
            ConfigError: an adapter of another kind, an optimizer without hooks or without a matrix B of the adapter, or
                with a weight decay, which would be scaled with the update; one whose updates of B are scaled already.
        """
        config = getattr(model, "peft_config", {}).get(adapter_name)
        if not isinstance(config, ALLoRAConfig) or config.form != "update":
            raise ConfigError(f"the adapter {adapter_name!r} is no ALLoRA adapter of the form update.")
        # accelerate's holds the real one
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if not hasattr(optimizer, "register_step_pre_hook"):
            raise ConfigError(
                f"allora's form is update, and {type(optimizer).__name__} has no hooks around its step. Use an "
                "optimizer of torch, or the form gradient."
            )
        self._matrices = [
            (layer.lora_A[name].weight, layer.lora_B[name].weight, variant.eta)
            for _, layer, variant, name in layers_of(model, adapter_name)
        ]
        decays = {id(p): group.get("weight_decay", 0.0) for group in optimizer.param_groups for p in group["params"]}
        missing = sum(id(B) not in decays for _, B, _ in self._matrices)
        if missing:
            raise ConfigError(
                f"{missing} of the adapter's {len(self._matrices)} matrices B are none of this optimizer's parameters. "
                "Give the optimizer that trains them."
            )
        self._known = {id(B) for _, B, _ in self._matrices}
        if self._known & _SCALED.get(optimizer, set()):
            raise ConfigError(
                "allora: this optimizer's updates of B are scaled already, and twice would be another rule. The "
                "trainers of posttrain do it by themselves; else call `remove` of the first ScaledUpdates."
            )
        decay = max(decays[id(B)] for _, B, _ in self._matrices)
        if decay:
            raise ConfigError(
                f"weight_decay is {decay:g} with allora's form update, which would scale the decay of B as well. Set "
                "`weight_decay: 0`, or `allora_form: gradient`."
            )
        self.steps, self._before = 0, []
        self._updates = [variant.updates for _, _, variant, _ in layers_of(model, adapter_name)]
        self._note(True)
        self._optimizer = weakref.ref(optimizer)
        _SCALED[optimizer] = _SCALED.get(optimizer, set()) | self._known
        self._hooks = [optimizer.register_step_pre_hook(self._begin), optimizer.register_step_post_hook(self._end)]

    def remove(self) -> None:
        """Let the optimizer update B as it does."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks, optimizer = [], self._optimizer()
        if optimizer is not None:
            _SCALED[optimizer] = _SCALED.get(optimizer, set()) - self._known
        self._note(False)

    def _note(self, are_scaled: bool) -> None:
        for updates in self._updates:
            updates.are_scaled = are_scaled

    def _begin(self, optimizer, args, kwargs) -> None:
        self._before = [(B.detach().clone(), scale_of(gram(A), B, eta)) for A, B, eta in self._matrices]

    @torch.no_grad()
    def _end(self, optimizer, args, kwargs) -> None:
        for (_, B, _), (before, scale) in zip(self._matrices, self._before, strict=True):
            # in float64, as the factors are: what is not updated stays what it is
            B.copy_(before + scale[:, None] * (B.double() - before))
        self._before, self.steps = [], self.steps + 1
