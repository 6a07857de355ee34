"""Cross-entropy of the learned tokens alone, whose logits are formed once, in the place of TRL's fused head.

Where kernels of Triton are not to be had TRL's head scores prompts and padding too, and forms its logits anew in the
backward pass.
"""

import contextlib

import torch
from torch import nn

from posttrain.mechanisms.noise.controller import innermost
from posttrain.mechanisms.noise.head import give_scoring, output_of
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
        give_scoring(innermost(model), lambda: self._is_used and self.is_right, self._scored)

    def _scored(self, model, *args, labels=None, fused_lm_head=True, **kwargs):
        if labels is None or kwargs.get("shift_labels") is not None:
            return None
        states = model.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        return output_of(model, [states], labels, PLAIN)[1]

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
                # the whole model is called, as engines gather weights in its forward
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
