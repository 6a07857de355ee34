"""What preference trainers share; each is (this mixin, TRL's DPOTrainer)."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor

from posttrain.compat import keep_4bit_weights_trainable
from posttrain.data import formats
from posttrain.log import get_logger
from posttrain.mechanisms.dropout import check_functional_dropout, drops_out
from posttrain.mechanisms.length_sorting import sort_groups
from posttrain.mechanisms.metrics import MeanMetrics
from posttrain.mechanisms.row_groups import CHOSEN, REJECTED, RowGroups
from posttrain.mechanisms.window import Window, on_host
from posttrain.run import checks, evaluation, new_tokens, start
from posttrain.run.head import TrueHead
from posttrain.run.reference import check_zero_margin, describe_reference, gap_at_start, may_be_identity
from posttrain.run.sharing import PrefixSharing
from posttrain.run.window import ExtraColumns, WindowMixin
from posttrain.trainers.preference import metrics, prepare, reference_logps
from posttrain.trainers.preference.rows import PairRows

# what a batch is packed by
_TOKENS = ("input_ids", "attention_mask", "completion_mask")
# a batch's vectors that have a number for each row of a side; all others have one for each group
_SIDES = {"ref_chosen_logps": CHOSEN, "ref_rejected_logps": REJECTED}


@dataclass
class PairLogps:
    """Holds one forward's results on a batch of pairs, or of other groups of chosen and rejected rows.

    Attributes:
        chosen_logps, rejected_logps: summed log-probabilities of the completions in nats, fp32: (C,) of the chosen
            rows, (D,) of the rejected ones. Of B pairs both are (B,).
        outputs: the fused head's per-token fields, (R, L - 1), in the batch's order.
        shift_mask: (R, L - 1) 1 where the next token belongs to the completion.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    outputs: Any
    shift_mask: Tensor


class PreferenceMixin(PairRows, WindowMixin):
    """Trains on preferences, in four seams: `score`, `pair_losses`, `reduce_pairs`, `extra_metrics`.

    Every pass over the model (policy, reference, precompute, window scoring, evaluation) goes through `score`. The
    mean over pairs is taken over the optimiser step's global batch, whatever its split; metrics are kept as sums and
    counts and reduced once per log.

    What is said of pairs below holds for groups of any size: a batch is one of B pairs, 2B rows with the chosen ones
    first, unless its collator has put a `RowGroups` into it as `row_groups`.
    """

    extra_columns = {"flip_rate": "flip_rate"}

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *rest,
        **kwargs,
    ):
        self._reference_is_given = ref_model is not None
        kwargs = self._by_name(rest, kwargs)
        peft_config = kwargs.get("peft_config")

        def ready(model, args, config):
            prepare.check_reference_is_loadable(model, ref_model, args, peft_config)
            return prepare.prepare(model, args, config, processing_class, train_dataset, eval_dataset)

        kwargs |= dict(ref_model=ref_model, data_collator=data_collator, processing_class=processing_class)
        self._build(model, args, kwargs, ready, super().__init__)

    def _begin(self, ready) -> None:
        self._limits = ready.limits
        self._begin_window()
        self._margin_checked, self._drops_out = False, False
        self.reference_key, self._sharing = None, None

    def _place(self, ready) -> None:
        start.use_adapter_dropout(self.model)
        self._drops_out = drops_out(self.model)

    def _complete(self, ready) -> None:
        if set(formats.TOKEN_COLUMNS) <= set(getattr(self.train_dataset, "column_names", None) or ()):
            new_tokens.warn_of_frozen(self.model, self.train_dataset, formats.TOKEN_COLUMNS, self.processing_class)
            new_tokens.warn_of_absent(self.model, self.train_dataset, formats.TOKEN_COLUMNS, self.processing_class)
        self._set_up_sharing()
        self.data_collator = ExtraColumns(self.data_collator, self.extra_columns)
        get_logger().info("reference: %s", describe_reference(self))

    def groups_of(self, batch) -> RowGroups:
        """Return which rows of a batch form a group, and which of them are chosen."""
        groups = batch.get("row_groups")
        return groups if groups is not None else RowGroups.pairs(batch["input_ids"].size(0) // 2)

    def rows_in(self, batch) -> int:
        return self.groups_of(batch).count

    def _live_reference(self, args) -> bool:
        return not self._reference_is_given

    def score(self, model, batch, aux_loss: bool = False) -> PairLogps:
        """Run `model` on a padded batch and sum the log-probabilities of each completion.

        With `ld_alpha`, tokens beyond the shortest completion of a pair count `ld_alpha` (LD-DPO). `aux_loss`: ask a
        mixture of experts for its load-balancing loss, in `outputs`.
        """
        mask = batch["completion_mask"]
        kwargs = self.model_inputs(batch)
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        self._head.check(model)
        packed = self._packed(model, batch)
        if packed is not None:
            kwargs["packed"] = packed
        if aux_loss:
            kwargs["output_router_logits"] = True
        outputs = model(**kwargs, use_cache=False, labels=labels, fused_lm_head=True)
        shift_mask, groups = mask[:, 1:], self.groups_of(batch)
        # Prompt-learning adapters put virtual tokens in front
        per_token_logps = outputs.log_probs[:, -shift_mask.size(1) :]
        if self.ld_alpha is None:
            logps = per_token_logps.sum(dim=1)
        else:
            position = shift_mask.cumsum(dim=1)
            shared = groups.to_rows(groups.smallest(shift_mask.sum(dim=1))).unsqueeze(1)
            common = (per_token_logps * ((position > 0) & (position <= shared))).sum(dim=1)
            logps = common + self.ld_alpha * (per_token_logps * (position > shared)).sum(dim=1)
        return PairLogps(*groups.split(logps), outputs, shift_mask)

    def _set_up_sharing(self) -> None:
        # TRL's constructor precomputes reference log-probs before it returns, so whoever comes first
        if self._sharing is None:
            self._note_start()
            if self.args.disable_dropout:
                placed = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
                check_functional_dropout(self.model, can_run=placed)
            self._drops_out = drops_out(self.model)
            self._head = TrueHead(self)
            self._sharing = PrefixSharing(self)

    def _extras(self, batch) -> set[str]:
        """Return what a batch holds for the model beside tokens and their mask, which cannot be packed."""
        return self.model_inputs(batch).keys() - {"input_ids", "attention_mask"}

    def _packed(self, model, batch):
        """Return a batch with each pair's completions behind their prompt; None where it must be padded."""
        extras = self._extras(batch)
        if extras and self._sharing.active:
            self._sharing.decline(f"it holds {', '.join(sorted(extras))} for the model")
            return None
        self._sharing.check(model)
        return self._sharing.pack(batch, self.groups_of(batch).numbers)

    # stands on DPOTrainer.compute_ref_log_probs, which the precompute pass and users call
    def compute_ref_log_probs(self, model, inputs) -> tuple[Tensor, Tensor]:
        """Return the reference's summed log-probs of one padded batch: chosen (C,), rejected (D,), in nats."""
        reference = self.ref_model if self.ref_model is not None else model
        adapter = contextlib.nullcontext()
        # not by accelerate, which walks all modules
        if self.ref_model is None and isinstance(self.model, PeftModel):
            adapter = self.switches.adapter("ref" if "ref" in self.model.peft_config else None)
        # upstream leaves the model in training mode, where the base's own dropout would fall on the reference
        clean = checks.evaluating(reference) if self._drops_out else contextlib.nullcontext()
        with torch.no_grad(), clean, self.plain_forward(), adapter, self.accelerator.autocast():
            scores = self.score(reference, inputs)
        return scores.chosen_logps, scores.rejected_logps

    def _reference_logps(self, model, inputs) -> tuple[Tensor, Tensor]:
        # columns of that name in rows are somebody else's unless they were computed here
        is_ours = self.args.precompute_ref_log_probs or inputs.get("reference_is_known", False)
        if is_ours and "ref_chosen_logps" in inputs:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.compute_ref_log_probs(model, inputs)

    # stands on DPOTrainer._precompute_ref_logps
    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        keep_4bit_weights_trainable(self.model)
        self._set_up_sharing()
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        return reference_logps.precompute(self, dataset, name, batch_size)

    def sorted_window(self, batches: list[dict]) -> list[dict]:
        """Sort a step's pairs by length into micro-batches, where the step does not depend on the grouping.

        Where batches run packed, those of the step are packed here, so that the device is waited for once a step.
        """
        if not self._sharing.active:
            return batches
        host = on_host(batches, _TOKENS)
        whole = all(batch["real_rows"] == self.rows_in(batch) for batch in batches)
        # a user's collator may pad on the left, where columns cannot be cut off
        whole = whole and all(bool(own["attention_mask"][:, 0].all()) for own in host)
        if self._sharing.may_sort and whole and not self.split_matters:
            groups = [self.groups_of(batch) for batch in batches]
            lengths = [own["attention_mask"].sum(dim=1).tolist() for own in host]
            batches = sort_groups(batches, groups, _SIDES, lengths)
            host = sort_groups(host, groups, {}, lengths)
        for batch, own in zip(batches, host, strict=True):
            if not self._extras(batch):
                self._sharing.pack(batch, self.groups_of(batch).numbers, own)
        return batches

    @property
    def split_matters(self) -> bool:
        """Return whether the step depends on which pairs share a micro-batch, as the agreement of gradients does."""
        return self.args.gradient_agreement is not None

    def prepare_window(self, batches: list[dict], window: Window) -> None:
        """Give every pair of the step its coefficient c: a micro-batch of B pairs trains on `sum_i c_i loss_i / B`."""
        for batch in batches:
            batch["pair_coefficients"] = self.is_real(batch) * window.rescale(self.rows_in(batch))

    # stands on DPOTrainer._compute_loss
    def _compute_loss(self, model, inputs, return_outputs=False):
        mode = "train" if self.model.training else "eval"
        inputs = self.with_real_rows(inputs, mode)
        with self.policy_forward():
            scores = self.score(model, inputs, aux_loss=True) if self.aux_loss_enabled else self.score(model, inputs)
        ref_chosen_logps, ref_rejected_logps = self._reference_logps(model, inputs)
        chosen_logratios = scores.chosen_logps - ref_chosen_logps
        rejected_logratios = scores.rejected_logps - ref_rejected_logps
        self._check_first_margins(model, scores, (ref_chosen_logps, ref_rejected_logps), inputs)
        losses = self.pair_losses(chosen_logratios, rejected_logratios, inputs)
        loss = self.reduce_pairs(losses, inputs, mode)
        loss = self.finish_loss(loss, getattr(scores.outputs, "aux_loss", None), mode)
        with torch.no_grad():
            metrics.record(self, mode, scores, chosen_logratios, rejected_logratios, losses, inputs)
        if return_outputs:
            with torch.no_grad():
                return loss, model(**self.model_inputs(inputs), use_cache=False)
        return loss

    def reduce_pairs(self, losses: Tensor, inputs: dict, mode: str) -> Tensor:
        """Return a micro-batch's loss: the mean over pairs, in training with the window's coefficients."""
        if mode == "train" and "pair_coefficients" in inputs:
            return (losses * inputs["pair_coefficients"]).mean()
        # A rank whose last batch only fills up has no row that counts; its value is cut off by the Trainer's gather
        return losses[: max(inputs["real_rows"], 1)].mean()

    def _check_first_margins(self, model, scores: PairLogps, reference: tuple[Tensor, Tensor], inputs: dict) -> None:
        if self._margin_checked or not self.model.training:
            return
        self._margin_checked = True
        if self._reference_is_given or not self.args.check_reference or self.state.global_step > 0:
            return
        if not may_be_identity(self.model):
            return
        if self._drops_out or self.weights_have_noise:
            with torch.no_grad(), checks.evaluating(model), self.plain_forward():
                scores = self.score(model, inputs)
        groups = self.groups_of(inputs)
        logps = groups.join(scores.chosen_logps, scores.rejected_logps)
        gap = gap_at_start(self, logps - groups.join(*reference), inputs["completion_mask"].sum(dim=1))
        check_zero_margin(gap, self.model, self.accelerator, describe_reference(self))

    # stands on Trainer.evaluation_loop, which puts its own `gather_function` back
    def evaluation_loop(self, *args, **kwargs):
        self.gather_function = evaluation.GroupRows(self.accelerator)
        return super().evaluation_loop(*args, **kwargs)

    # stands on DPOTrainer.prediction_step
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if isinstance(self.gather_function, evaluation.GroupRows):
            # the collator decides, which is the same one on every rank
            unequal = "row_groups" in inputs
            self.gather_function.begin(self.groups_of(inputs), self.accelerator.device, unequal)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def pair_losses(self, chosen_logratios: Tensor, rejected_logratios: Tensor, inputs: dict) -> Tensor:
        """Return the loss of each pair, (B,), from log-ratios in nats: (C,) of chosen and (D,) of rejected rows.

        Of pairs both are (B,); `groups_of(inputs)` averages the rows of larger groups.
        """
        raise NotImplementedError

    def extra_metrics(self, means: MeanMetrics, losses: Tensor, margins: Tensor, inputs: dict, mode: str) -> None:
        """Add a method's own metrics; `losses` (B,) and `margins` (B,), chosen less rejected log-ratios, in nats."""
