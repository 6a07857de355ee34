"""The wrapper of a model's fused forward: a padded batch in, one packed forward, padded results out."""

import functools
import types

import torch

from posttrain.mechanisms.prefix_sharing.packing import PackedBatch

_REPLACED = ("input_ids", "attention_mask", "position_ids", "labels", "shift_labels")


def share_prefixes(model) -> None:
    """Give `model` a forward that runs packed where it is called with `packed=` (a `PackedBatch` of the same batch).

    The model is a causal language model to which `trl.trainer.utils.add_fused_lm_head` was applied; called with
    `fused_lm_head=True, packed=...` it returns the fields that it would return for the padded batch, zero where the
    label is -100. The states of scored tokens alone reach the LM head. Any other call goes to the forward as it was.
    It sits on the innermost model, so PEFT, DDP and DeepSpeed around it need not know.
    """
    before = model.forward
    # unbound where it can be: a deep copy's forward must run the copy
    inner = getattr(before, "__func__", None) or (lambda self, *args, **kwargs: before(*args, **kwargs))

    # generate() checks its arguments against the signature
    @functools.wraps(type(model).forward)
    def forward(self, *args, packed: PackedBatch | None = None, **kwargs):
        if packed is None or not kwargs.get("fused_lm_head"):
            return inner(self, *args, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in _REPLACED}
        config = self.config.get_text_config()
        implementation, dtype = config._attn_implementation, self.get_input_embeddings().weight.dtype
        if implementation == "sdpa" and torch.is_autocast_enabled(packed.input_ids.device.type):
            dtype = torch.get_autocast_dtype(packed.input_ids.device.type)
        mask = packed.attention_mask(implementation, dtype)
        hook = self.base_model.register_forward_hook(functools.partial(_keep_scored, packed))
        try:
            outputs = inner(
                self,
                *args,
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                attention_mask=mask,
                shift_labels=packed.labels.unsqueeze(0),
                **kwargs,
            )
        finally:
            hook.remove()
        for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask"):
            values = getattr(outputs, name)
            if values is not None:
                setattr(outputs, name, packed.unpack(values[0]))
        return outputs

    model.forward = types.MethodType(forward, model)


def _keep_scored(packed: PackedBatch, module, args, output):
    output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[packed.sources].unsqueeze(0)
    return output
