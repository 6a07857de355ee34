"""Training on tokenised rows: one by one, by the sequences' losses; or by TRL's own mean over their tokens."""

import torch
from torch import Tensor

from posttrain.data import objects
from posttrain.data.tokens import as_learned, as_rendered
from posttrain.errors import ConfigError
from posttrain.mechanisms.metrics import MeanMetrics
from posttrain.mechanisms.window import Window
from posttrain.run import new_tokens
from posttrain.run.mixin import RunMixin
from posttrain.run.sharing import record_padding
from posttrain.run.window import WindowMixin
from posttrain.trainers.sft.prepare import prepare


class RenderedRows:
    """Tokenises rows so that texts begin and end once and prompts end where the row's do, however TRL gets them."""

    # stands on SFTTrainer._prepare_dataset
    def _prepare_dataset(self, dataset, processing_class, *args, **kwargs):
        if "input_ids" not in objects.names_of(dataset):
            dataset = as_rendered(dataset, processing_class)
        return as_learned(
            super()._prepare_dataset(dataset, processing_class, *args, **kwargs), processing_class, "a row"
        )


class InstructionMixin(RenderedRows, RunMixin):
    """Trains a method on TRL's SFTTrainer that keeps its loss, the mean over the tokens of the optimiser step.

    Its forward is the policy's: what a method puts around that goes into `around_policy_forward`.
    """

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *rest,
        **kwargs,
    ):
        kwargs = self._by_name(rest, kwargs)
        if kwargs.get("formatting_func") is not None:
            raise ConfigError(
                "formatting_func is given, which this trainer does not use. Leave it out, and make the rows' columns "
                "with datasets.Dataset.map."
            )

        def ready(model, args, config):
            return prepare(model, args, config, processing_class, train_dataset, eval_dataset)

        def construct(model, args, ready):
            given = (args, data_collator, ready.train_dataset, ready.eval_dataset, processing_class)
            super(InstructionMixin, self).__init__(model, *given, **kwargs)

        self._build(model, args, kwargs.get("peft_config"), ready, construct)

    def _place(self, ready) -> None:
        new_tokens.warn_of_frozen(self.model, self.train_dataset, ("input_ids",), self.processing_class)
        new_tokens.warn_of_absent(self.model, self.train_dataset, ("input_ids",), self.processing_class)

    # stands on SFTTrainer.compute_loss
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.policy_forward():
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training and self.is_in_train:
            self._finite_loss.watch(self, found[0] if return_outputs else found)
        return found


class SFTMixin(RenderedRows, WindowMixin):
    """Trains a method on TRL's SFTTrainer, in two seams: `sequence_losses` and `extra_metrics`.

    Every pass over the model goes through `score`. The mean over rows is taken over the optimiser step's global batch,
    whatever its split.
    """

    # stands on Trainer.loss_is_scaled_for_ga: losses are divided by the sequences of the whole step here
    loss_is_scaled_for_ga = True

    def sequence_losses(self, logps: Tensor, mask: Tensor, inputs: dict) -> Tensor:
        """Return the loss of each sequence, (B,), from its tokens' log-probabilities (B, T) in nats."""
        raise NotImplementedError

    def extra_metrics(self, means: MeanMetrics, logps: Tensor, mask: Tensor, inputs: dict, real: Tensor) -> None:
        """Add a method's own metrics; `real` (B,) says which rows are data."""

    def check_first(self, logps: Tensor, mask: Tensor, inputs: dict) -> None:
        """Check a micro-batch before the first step, for what the method expects of its start."""

    def prepare_window(self, batches: list[dict], window: Window) -> None:
        for batch in batches:
            batch["window_rows"] = window.rows

    def score(self, model, batch) -> tuple[Tensor, Tensor]:
        """Return a padded batch's token log-probs (B, L - 1), in nats, and which of them are the answers'."""
        outputs = self.scored_forward(model, batch)
        return outputs.log_probs, outputs.label_mask

    def scored_forward(self, model, batch, aux_loss: bool = False):
        """Run the fused head on a padded batch; answers to one prompt share its forward where that is possible.

        `aux_loss`: ask a mixture of experts for its load-balancing loss.
        """
        # nothing of the batch reaches the model but these
        rows = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        self._head.check(model)
        if self._sharing.active:
            self._sharing.check(model)
        if self._sharing.active:
            packed = batch["packed"] = self._sharing.pack_rows(**rows)
            rows |= {"packed": packed} if packed is not None else {}
        if aux_loss:
            rows["output_router_logits"] = True
        return model(**rows, use_cache=False, fused_lm_head=True)

    # stands on SFTTrainer.compute_loss
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode, in_window = "train" if self.model.training else "eval", "window_rows" in inputs
        inputs = self.with_real_rows(inputs, mode)
        real_count, rows = inputs["real_rows"], self.rows_in(inputs)
        with self.policy_forward():
            outputs = self.scored_forward(model, inputs, self.aux_loss_enabled)
        logps, mask = outputs.log_probs, outputs.label_mask
        self.check_first(logps, mask, inputs)
        losses = self.sequence_losses(logps, mask, inputs)
        if mode == "train" and in_window:
            # undoes the mean over ranks
            loss = losses[:real_count].sum() * self.accelerator.num_processes / inputs["window_rows"]
        else:
            # A rank whose last batch only fills up has no row that counts; the Trainer's gather cuts its value off
            loss = losses[: max(real_count, 1)].mean()
        # the auxiliary loss is the mean over the step's micro-batches, as TRL has it
        steps = self.current_gradient_accumulation_steps if mode == "train" and in_window else 1
        loss = self.finish_loss(loss, getattr(outputs, "aux_loss", None), mode, steps)
        with torch.no_grad():
            self._record(mode, outputs, inputs, torch.arange(rows, device=logps.device) < real_count)
        if return_outputs:
            plain = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            with torch.no_grad():
                return loss, model(**plain, use_cache=False)
        return loss

    def _record(self, mode: str, outputs, inputs: dict, real: Tensor) -> None:
        means, mask = self._means[mode], outputs.label_mask & real.unsqueeze(1)
        means.add("nll/sequence", -outputs.log_probs.sum(dim=1), real)
        means.add("nll/token", -outputs.log_probs, mask)
        if outputs.entropy is not None:
            means.add("entropy", outputs.entropy, mask)
        if outputs.is_top1 is not None:
            means.add("mean_token_accuracy", outputs.is_top1.float(), mask)
        if mode == "train":
            tokens = inputs["attention_mask"].sum(dim=1)
            means.add_sum("num_tokens", (tokens * real).sum().float(), 1)
            record_padding(means, inputs["attention_mask"], inputs.get("packed"))
        self.extra_metrics(means, outputs.log_probs, outputs.label_mask, inputs, real)
