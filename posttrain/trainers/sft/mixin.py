"""Training on tokenised rows: one by one, by the sequences' losses; or by TRL's own mean over their tokens."""

import contextlib

import torch
from accelerate.utils import find_batch_size
from torch import Tensor

from posttrain.data import objects
from posttrain.data.tokens import as_learned, as_rendered
from posttrain.errors import ConfigError
from posttrain.mechanisms.metrics import MeanMetrics
from posttrain.mechanisms.noise.branches import repeated
from posttrain.mechanisms.window import Window, count_rows, on_host
from posttrain.run import new_tokens
from posttrain.run.prepared import check_fills_a_batch
from posttrain.run.sharing import record_padding
from posttrain.run.window import WindowMixin
from posttrain.trainers.sft.prepare import prepare

_TOKENS = ("input_ids", "attention_mask", "labels")


class RenderedRows:
    """Tokenises rows so that texts begin and end once and prompts end where the row's do, however TRL gets them."""

    # stands on SFTTrainer._prepare_dataset
    def _prepare_dataset(self, dataset, processing_class, *args, **kwargs):
        if "input_ids" not in objects.names_of(dataset):
            dataset = as_rendered(dataset, processing_class)
        return as_learned(
            super()._prepare_dataset(dataset, processing_class, *args, **kwargs), processing_class, "a row"
        )


class RowLengths:
    """Collates rows, and adds the number of tokens of each (B,) where the collator has put them all into one row."""

    def __init__(self, collator) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.collator(examples)
        if len(examples) > 1 and find_batch_size(batch) == 1 and "input_ids" in examples[0]:
            batch["row_lengths"] = torch.tensor([len(example["input_ids"]) for example in examples])
        return batch


class InstructionMixin(RenderedRows, WindowMixin):
    """Trains a method on TRL's SFTTrainer that keeps its loss, the mean over the tokens of the optimiser step.

    Rows that only fill up the last round of several ranks are forwarded, and nothing is learned or counted of them. Its
    forward is the policy's: what a method puts around that goes into `around_policy_forward`.
    """

    # which tokens of the batch being trained on are of rows of data, (B, T) or (B, 1); None where all are
    counted_tokens: Tensor | None = None
    # how often each row is in the forward that is trained, the loss being the mean over its copies
    copies = 1

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
            adapter = kwargs.get("peft_config")
            return prepare(model, args, config, processing_class, train_dataset, eval_dataset, adapter)

        kwargs |= dict(data_collator=data_collator, processing_class=processing_class)
        self._build(model, args, kwargs, ready, super().__init__)

    def _begin(self, ready) -> None:
        self._begin_window()

    def _place(self, ready) -> None:
        if hasattr(self.train_dataset, "__len__"):
            # tokens that change with the model are counted here first
            check_fills_a_batch(self.args, len(self.train_dataset))
        self.data_collator = RowLengths(self.data_collator)
        new_tokens.warn_of_frozen(self.model, self.train_dataset, ("input_ids",), self.processing_class)
        new_tokens.warn_of_absent(self.model, self.train_dataset, ("input_ids",), self.processing_class)

    def rows_in(self, batch) -> int:
        return batch["row_lengths"].size(0) if "row_lengths" in batch else find_batch_size(batch)

    def tokens_of_data(self, batch) -> Tensor | None:
        """Return which tokens are of rows of data: (B, 1), or (1, T) of rows in one; None where all are."""
        real = batch["real_rows"]
        if real == self.rows_in(batch):
            return None
        if "row_lengths" not in batch:
            return self.is_real(batch).unsqueeze(1)
        place = torch.arange(batch["input_ids"].size(1), device=batch["input_ids"].device)
        return (place < batch["row_lengths"][:real].sum()).unsqueeze(0)

    def learned_of_data(self, batch) -> dict:
        """Return a batch without the labels of rows that only fill it up."""
        counted = self.tokens_of_data(batch)
        if counted is None or "labels" not in batch:
            return batch
        return {**batch, "labels": batch["labels"].masked_fill(~counted, -100)}

    def _counting_rows(self, batches):
        # before upstream counts the tokens that the step's loss is divided by
        for batch in super()._counting_rows(batches):
            yield self.learned_of_data(batch)

    def prepare_window(self, batches: list[dict], window: Window) -> None:
        # the same on every rank
        if sum(map(self.rows_in, batches)) * window.world_size > window.rows:
            # TRL adds the tokens of all rows
            self._total_train_tokens -= count_rows(self.accelerator, sum(map(self._repeated_tokens, batches)))

    def _repeated_tokens(self, batch) -> int:
        if "row_lengths" in batch:
            lengths = batch["row_lengths"]
        elif "attention_mask" in batch:
            lengths = batch["attention_mask"].sum(dim=1)
        else:
            # rows that hold several sequences, without padding
            lengths = torch.full((self.rows_in(batch),), batch["input_ids"].size(1))
        return int(lengths[batch["real_rows"] :].sum())

    @contextlib.contextmanager
    def _sums_over_ranks(self):
        # TRL sums over ranks with gather_for_metrics, which takes the sums for rows at the end of an epoch and cuts
        # them off; of repeats nothing is in them
        self.accelerator.gather_for_metrics = self.accelerator.gather
        try:
            yield
        finally:
            del self.accelerator.gather_for_metrics

    # stands on SFTTrainer.compute_loss
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = self.learned_of_data(self.with_real_rows(inputs, "train" if self.model.training else "eval"))
        self.counted_tokens = self.tokens_of_data(inputs)
        inputs = {name: value for name, value in inputs.items() if name not in ("real_rows", "row_lengths")}
        copies, before = self.copies if self.model.training else 1, self._total_train_tokens
        if copies > 1:
            inputs = repeated(inputs, copies)
            num_items_in_batch = None if num_items_in_batch is None else num_items_in_batch * copies
        with self.policy_forward(), self._sums_over_ranks():
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if copies > 1 and "attention_mask" in inputs:
            # TRL has counted each copy of a token
            self._total_train_tokens = before + (self._total_train_tokens - before) // copies
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
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

    def sorted_window(self, batches: list[dict]) -> list[dict]:
        """Pack a step's micro-batches where they run packed, so that the device is waited for once a step."""
        if self._sharing.active:
            for batch, own in zip(batches, on_host(batches, _TOKENS), strict=True):
                batch["packed"] = self._sharing.pack_rows(**own, device=batch["input_ids"].device)
        return batches

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
        rows = {key: batch[key] for key in _TOKENS}
        self._head.check(model)
        if self._sharing.active:
            self._sharing.check(model)
        if not self._sharing.active:
            # planned for the step before a model's check gave it up
            batch.pop("packed", None)
        else:
            if "packed" not in batch:
                batch["packed"] = self._sharing.pack_rows(**rows)
            packed = batch["packed"]
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
