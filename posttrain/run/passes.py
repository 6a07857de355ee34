"""The contexts of a trainer's passes over the model: which of its parts are off, and what a method puts around them."""

import contextlib

import torch
from peft import PeftModel

from posttrain.mechanisms.switches import Switches


class PassesMixin:
    """Gives a trainer the contexts that its forwards are in. Stands on `transformers.Trainer`."""

    # whether a training step has forwards of the model that are not under autocast
    generates_in_steps = False
    _switches: Switches | None = None

    def plain_forward(self):
        """Return a context without recomputation: it has no use without gradient, and reentrant checkpointing warns."""
        if not self.args.gradient_checkpointing:
            return contextlib.nullcontext()
        return self.switches.without_checkpointing()

    @property
    def switches(self) -> Switches:
        """Return the switches of the policy's adapter and of its gradient checkpointing."""
        if self._switches is None or self._switches.model is not self.model:
            self._switches = Switches(self.model)
        return self._switches

    @contextlib.contextmanager
    def policy_forward(self):
        """Enter the policy's forward whose loss is backpropagated; every family does so around it.

        A forward without gradient, or of a model in eval mode, goes through unchanged, also within.
        """
        armed = self.model.training and torch.is_grad_enabled()
        with self.around_policy_forward() if armed else contextlib.nullcontext():
            yield

    def around_policy_forward(self):
        """Return the context that a method puts around that forward and no other; none by default."""
        return contextlib.nullcontext()

    def _idle_casts_off(self):
        """Return the context of a step in which an adapter's input is cast by autocast alone."""
        spread = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.generates_in_steps or spread or not (self.accelerator.native_amp and isinstance(self.model, PeftModel)):
            return contextlib.nullcontext()
        return self.switches.without_casts()
