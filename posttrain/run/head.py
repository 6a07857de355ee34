"""The head of a trainer's models: TRL's fused one where it gives the model's own log-probabilities, else their own."""

import weakref

import torch
from accelerate.utils import is_peft_model

from posttrain.log import get_logger
from posttrain.mechanisms.own_head import Head, is_adapted
from posttrain.run import checks


class TrueHead:
    """Decides for each model whether TRL's fused head is used: at construction, or before its first forward.

    The first forward is the moment under DeepSpeed, which places the weights later.
    """

    def __init__(self, trainer) -> None:
        self._accelerator, self._chosen = trainer.accelerator, set()
        # looked for in an engine or a wrapper once, which walks all its modules
        self._seen = weakref.WeakSet()
        temperature = getattr(trainer, "temperature", 1.0)
        models = [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None]
        self._heads = {id(self._innermost(model)): Head(self._innermost(model), temperature) for model in models}
        if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
            for model in models:
                self.check(model)

    def check(self, model) -> None:
        """Compare the model's fused head with its own logits before a forward; all ranks call it."""
        if model in self._seen:
            return
        self._seen.add(model)
        inner = self._innermost(model)
        head = self._heads.get(id(inner))
        if head is None or id(inner) in self._chosen:
            return
        self._chosen.add(id(inner))
        vocab_size, device = inner.config.get_text_config().vocab_size, self._accelerator.device
        with checks.evaluating(model):
            reason = head.choose(model, vocab_size, device, is_adapted(inner))
        # one rank's rounding must not part it from the others
        order = ("fused", "tiles", "whole")
        own = torch.tensor([order.index(head.mode)], device=device)
        head.mode = order[self._accelerator.gather(own).max().item()]
        if reason:
            get_logger().info("log-probabilities come from the model's own head (%s): %s", type(inner).__name__, reason)

    def _innermost(self, model):
        model = self._accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model
