"""Cross-entropy of the learned tokens alone, whose logits are formed once, in the place of TRL's fused head.

Where kernels of Triton are not to be had TRL's head scores prompts and padding too, and forms its logits anew in the
backward pass.
"""

import contextlib
import functools
import types

import torch
from torch import nn

from posttrain.mechanisms.noise.controller import innermost
from posttrain.mechanisms.noise.head import output_of
from posttrain.objectives.consistency import Mode

PLAIN = Mode(clean=1.0, noisy=0.0, divergence=0.0, consistency=0.0, passes=0)
# gap of the losses, as a share, that rounding may make
_TOLERANCE = 1e-4


class LearnedHead:
    """Scores the policy's forwards within `used` by the learned tokens alone; any other call is as before.

    Attributes:
        is_right: whether it makes the loss of the model's own logits; until `settle` has found so it is not used.
    """

    def __init__(self) -> None:
        self.is_right, self._is_used = False, False

    @contextlib.contextmanager
    def used(self):
        """Score forwards that have a gradient by this head inside."""
        self._is_used = True
        try:
            yield
        finally:
            self._is_used = False

    def give(self, model: nn.Module) -> None:
        """Give the innermost model, which has TRL's fused head, a forward that is scored by this one within `used`."""
        inner = innermost(model)
        before, head = inner.forward, self
        # unbound where it can be: a deep copy's forward must run the copy
        plain = getattr(before, "__func__", None) or (lambda self, *args, **kwargs: before(*args, **kwargs))

        # generate() checks its arguments against the signature
        @functools.wraps(type(inner).forward)
        def forward(self, *args, **kwargs):
            labels = kwargs.get("labels")
            asked = head._is_used and head.is_right and kwargs.get("fused_lm_head") and torch.is_grad_enabled()
            if not asked or labels is None or kwargs.get("shift_labels") is not None:
                return plain(self, *args, **kwargs)
            given = {name: value for name, value in kwargs.items() if name not in ("labels", "fused_lm_head")}
            states = self.base_model(*args, **given | {"use_cache": False}).last_hidden_state
            return output_of(self, [states], labels, PLAIN)[1]

        inner.forward = types.MethodType(forward, inner)

    def settle(self, model: nn.Module) -> None:
        """Compare this head's loss of made-up tokens to that of the model's own logits, and set `is_right`."""
        inner = innermost(model)
        device = inner.get_input_embeddings().weight.device
        size = inner.config.get_text_config().vocab_size
        ids = torch.randint(size, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
        labels = ids.clone()
        labels[1, :4] = -100
        given = dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        was_training = inner.training
        model.eval()
        try:
            with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
                # the whole model is called, as FSDP gathers weights in its forward
                self.is_right = True
                with self.used(), torch.enable_grad():
                    ours = model(**given, labels=labels, fused_lm_head=True).loss.item()
                with torch.no_grad():
                    logits = model(**given).logits[:, :-1].float()
                theirs = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels[:, 1:].flatten().to(logits.device), reduction="sum"
                ).item()
        finally:
            model.train(was_training)
        self.is_right = abs(ours - theirs) <= _TOLERANCE * abs(theirs)
