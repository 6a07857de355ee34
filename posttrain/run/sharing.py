"""Prefix sharing in a trainer: whether it is used, and each batch packed once."""

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset

from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.mechanisms import prefix_sharing
from posttrain.run.checks import evaluating

# how often flex attention may be compiled before torch gives it up for its form without a kernel; by default 8
_FLEX_GRAPHS = 64


def check_setting(args, config, peft_config=None) -> None:
    """Raise where `prefix_sharing: always` is impossible, as far as the model's config tells."""
    # a family without sharing has no such setting
    if getattr(args, "prefix_sharing", "never") != "always":
        return
    attention = (args.model_init_kwargs or {}).get("attn_implementation")
    reason = prefix_sharing.unsupported_reason(config, attention=attention, peft_config=peft_config)
    if reason:
        raise _refusal(reason)


def _refusal(reason: str) -> ConfigError:
    return ConfigError(
        f"prefix_sharing is always, which does not work here: {reason}. Set `prefix_sharing: auto`, which pads where "
        "it must."
    )


def record_padding(means, attention_mask, packed) -> None:
    """Add `tokens/padding_share` of a batch, padded or packed."""
    if packed is None:
        forwarded, padding = attention_mask.numel(), (attention_mask.numel() - attention_mask.sum()).float()
    else:
        forwarded = packed.forwarded
        padding = attention_mask.new_full((), packed.forwarded - packed.tokens, dtype=torch.float32)
    means.add_sum("tokens/padding_share", padding, forwarded)


_left_out_cudnn = False


def use_kernels(args, device: torch.device) -> None:
    """Have torch's attention take the kernels that the settings leave it, in this process: the latest trainer's."""
    global _left_out_cudnn
    if device.type != "cuda":
        return
    if not args.cudnn_attention:
        _left_out_cudnn = _left_out_cudnn or torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif _left_out_cudnn:
        # what an earlier trainer left out, and not the user
        torch.backends.cuda.enable_cudnn_sdp(True)
        _left_out_cudnn = False


def _shape_of_rows(trainer, config) -> dict:
    """Return how packed rows are shaped, as `pack_padded` takes it."""
    args, kind = trainer.args, trainer.accelerator.device.type
    attention, on_card = config.get_text_config()._attn_implementation, kind != "cpu"
    factor, multiple = args.attention_cost_factor, args.packed_width_multiple
    flex = on_card and attention == "flex_attention"
    if flex:
        import torch._dynamo

        # passes with and without gradient, of one row and several, of fixed and changing widths are compiled apart
        torch._dynamo.config.recompile_limit = max(_FLEX_GRAPHS, torch._dynamo.config.recompile_limit)
    return {
        "attention_cost": prefix_sharing.attention_cost(
            config, prefix_sharing.factor_of(attention, kind) if factor is None else factor
        ),
        # kernels on accelerators plan for each shape, and blocks of flex attention are as wide
        "multiple": (128 if on_card else 1) if multiple is None else multiple,
        "few_shapes": on_card,
        # a single row would be compiled for itself
        "least_rows": 2 if flex else 1,
    }


class PrefixSharing:
    """Decides at construction whether batches run packed; `pack` returns a batch's packed form, or None to pad it.

    Attributes:
        active: whether batches are packed at all.
        may_sort: whether it makes no difference which rows are in a batch together.
    """

    def __init__(self, trainer, left_padded: bool = False) -> None:
        """Decide for the models of `trainer`; `left_padded`: its batches have padding in front of the prompts."""
        self._left_padded = left_padded
        self._setting, self._accelerator = trainer.args.prefix_sharing, trainer.accelerator
        self._said: set[str] = set()
        self._checked: set[int] = set()
        self.active, self.may_sort = self._setting != "never", False
        if not self.active:
            return
        models = [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None]
        bases = [self._innermost(model) for model in models]
        adapter = trainer.model.active_peft_config if is_peft_model(trainer.model) else None
        for base in bases:
            reason = prefix_sharing.unsupported_reason(base.config, base, peft_config=adapter)
            if getattr(trainer, "aux_loss_enabled", False) and not left_padded:
                reason = "the auxiliary loss of a mixture of experts counts prompt tokens"
            if reason:
                self._give_up(reason)
                return
        scales = any(prefix_sharing.scales_with_length(base.config) for base in bases)
        if scales and left_padded:
            self._give_up("its rotary factors depend on the width of a batch")
            return
        for base in bases:
            prefix_sharing.share_prefixes(base)
        self.may_sort = not scales
        self._window = min(filter(None, (prefix_sharing.sliding_window(base.config) for base in bases)), default=None)
        self._shape = _shape_of_rows(trainer, bases[0].config)
        if self._setting == "always" and self._window:
            self._check_lengths(trainer)

    def pack(self, batch: dict, groups: list[int], host: dict | None = None):
        """Return the packed form of a padded batch, kept in `batch["packed"]`; None where it must be padded.

        `host`: the batch's tokens and masks on the host, where they are known there; else the device is waited for.
        """
        if not self.active:
            # planned for the step before a model's check gave it up
            batch.pop("packed", None)
            return None
        if "packed" not in batch:
            host = host or batch
            labels = host["input_ids"].masked_fill(host["completion_mask"] == 0, -100)
            packed = self.pack_rows(
                host["input_ids"], host["attention_mask"], labels, groups, batch["input_ids"].device
            )
            batch["packed"] = packed
            if packed is not None and packed.unshared:
                self._log_once(
                    "some pairs' prompts differ between the sides (truncation_mode keep_end cuts them at different "
                    "places); these run unshared, counted as prefix_sharing/unshared"
                )
        return batch["packed"]

    def pack_rows(self, input_ids, attention_mask, labels, groups: list[int] | None = None, device=None):
        """Return padded rows (B, L) in packed form; without `groups`, rows of equal prompts share them.

        `device`: where the packed form goes; default: where the rows are.
        """
        wide = self._window and input_ids.size(1) > self._window
        if wide and attention_mask.sum(dim=1).max() > self._window:
            self.decline(f"it has rows longer than the sliding window of {self._window}")
            return None
        return prefix_sharing.pack_padded(input_ids, attention_mask, labels, groups, device=device, **self._shape)

    def check(self, model) -> None:
        """Compare packed and padded log-probs of made-up tokens at each model's first forward; all ranks call it."""
        if not self.active or id(model) in self._checked:
            return
        self._checked.add(id(model))
        config, device = self._innermost(model).config, self._accelerator.device
        with evaluating(model):
            *gaps, trouble = prefix_sharing.compare_padded_and_packed(model, config, device, self._left_padded)
        # a rank of which the model tripped still has to meet the others here
        gathered = self._accelerator.gather(torch.tensor([gaps], device=self._accelerator.device))
        (largest, mean, _), if_ignored = gathered.amax(0).tolist(), gathered[:, 2].min().item()
        dtypes = {parameter.dtype for parameter in model.parameters()}
        half = dtypes != {torch.float32} or self._accelerator.mixed_precision != "no"
        reason = trouble or prefix_sharing.mismatch_reason(largest, mean, if_ignored, half)
        if reason:
            self._give_up(reason)

    def decline(self, reason: str) -> None:
        """Log once that a batch is padded although others are shared; an error with `always`."""
        if self._setting == "always":
            raise _refusal(f"a batch must be padded, as {reason}")
        self._log_once(f"a batch is padded, not shared: {reason}; so will others be")

    def _check_lengths(self, trainer) -> None:
        limit = getattr(trainer.args, "max_length", None)
        for sets in (trainer.train_dataset, trainer.eval_dataset):
            for rows in sets.values() if isinstance(sets, dict) else [sets]:
                if not isinstance(rows, Dataset) or "chosen_ids" not in rows.column_names:
                    continue
                lengths = (
                    len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows
                )
                longest = max(lengths, default=0)
                if min(longest, limit or longest) > self._window:
                    self.decline(f"a row of {longest} tokens is longer than the sliding window of {self._window}")

    def _innermost(self, model):
        model = self._accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    def _give_up(self, reason: str) -> None:
        if self._setting == "always":
            raise _refusal(reason)
        self._log_once(f"prefix sharing is not used: {reason}")
        self.active = False

    def _log_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            get_logger().info(text)
