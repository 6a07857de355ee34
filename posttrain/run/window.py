"""The optimiser step as one batch: rows are counted before the first backward, means kept as sums and counts."""

import inspect
import time

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from posttrain.mechanisms.metrics import MeanMetrics
from posttrain.mechanisms.window import Window, count_rows, real_rows
from posttrain.run.mixin import RunMixin
from posttrain.run.private_batches import is_nobodys


class ExtraColumns:
    """Collates columns that TRL's collator does not know, each into a tensor (B,) of floats.

    Args:
        collator: TRL's, or a user's.
        columns: the rows' names, and the batch's; rows without one are collated without it.
    """

    def __init__(self, collator, columns: dict[str, str]) -> None:
        self.collator, self.columns = collator, columns

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.collator(examples)
        for column, name in self.columns.items():
            if column in examples[0]:
                batch[name] = torch.tensor([float(example[column]) for example in examples])
        return batch


class WindowMixin(RunMixin):
    """Takes means over the optimiser step's global batch, whatever its split into micro-batches.

    A subclass says in `extra_columns` which columns of its rows reach the batch beside the tokens, in `rows_in` how
    many rows a batch has, and gives them their weights in `prepare_window`.
    """

    # columns of the rows that the batch carries beside TRL's: the rows' names to the batch's
    extra_columns: dict[str, str] = {}

    def _begin_window(self) -> None:
        """Set the running means, before the parent's constructor."""
        self._means = {"train": MeanMetrics(), "eval": MeanMetrics()}
        self._clock, self._input_names = None, None

    def rows_in(self, batch) -> int:
        """Return how many rows a batch has; of pairs, how many pairs."""
        return batch["input_ids"].size(0)

    def is_real(self, batch) -> Tensor:
        """Return which rows (B,) of a batch are data, and not repeats that fill it up."""
        return torch.arange(self.rows_in(batch), device=batch["input_ids"].device) < batch["real_rows"]

    def model_inputs(self, batch) -> dict:
        """Return the entries of a batch that the model's forward takes by name; the others are the loss's."""
        if self._input_names is None:
            model = self.accelerator.unwrap_model(self.model)
            model = model.get_base_model() if is_peft_model(model) else model
            names = {"input_ids", "attention_mask", *inspect.signature(model.forward).parameters}
            self._input_names = names - {"labels"}
        return {name: value for name, value in batch.items() if name in self._input_names}

    def prepare_window(self, batches: list[dict], window: Window) -> None:
        """Add to each micro-batch of an optimiser step what its loss needs to know of the others."""

    def sorted_window(self, batches: list[dict]) -> list[dict]:
        """Return a step's micro-batches with their rows regrouped, where no result depends on the grouping."""
        return batches

    # stands on Trainer.get_batch_samples: the whole accumulation window, before its first backward
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(self._counting_rows(epoch_iterator), num_batches, device)
        if self._clock is None:
            self._clock = time.monotonic()
        if batches:
            batches = self.sorted_window(batches)
            rows = count_rows(self.accelerator, sum(batch["real_rows"] for batch in batches))
            window = Window(len(batches), self.accelerator.num_processes, rows)
            self.prepare_window(batches, window)
            self.begin_step(batches, window)
        return batches, items

    def _counting_rows(self, batches):
        # counted at the moment a batch is drawn: the dataloader's state is of that batch
        for batch in batches:
            rows = 0 if is_nobodys(batch) else real_rows(self.accelerator, self.rows_in(batch))
            yield {**batch, "real_rows": rows}

    def with_real_rows(self, inputs: dict, mode: str) -> dict:
        """Return a batch with the number of its rows that are data, where no window has counted them."""
        if "real_rows" in inputs:
            return inputs
        rows = self.rows_in(inputs)
        return {**inputs, "real_rows": real_rows(self.accelerator, rows) if mode == "eval" else rows}

    # stands on the log of TRL's trainers, which averages the lists in `_metrics`
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._reduce_means(logs)
        super().log(logs, start_time)

    # stands on Trainer.evaluation_loop
    def evaluation_loop(self, *args, **kwargs):
        self._means["eval"].clear()
        return super().evaluation_loop(*args, **kwargs)

    def finish_evaluation(self, dataloader, description: str) -> None:
        self._reduce_means({})

    def _reduce_means(self, logs: dict[str, float]) -> None:
        """Reduce the means kept in `_means` into the lists that TRL averages on logging; all ranks call it."""
        mode = "train" if self.model.training else "eval"
        sums = self._means[mode].reduce(self.accelerator)
        if "num_tokens" in sums:
            tokens = int(sums.pop("num_tokens")[0])
            self._total_train_tokens += tokens
            if self._clock is not None:
                logs["tokens/per_second"] = tokens / (time.monotonic() - self._clock)
                self._clock = None
        metrics = {name: total / count if count else 0.0 for name, (total, count) in sums.items()}
        if metrics:
            if mode == "train" and self._private is not None:
                metrics |= self._private.figures()
            metrics["num_tokens"] = self._total_train_tokens
            self.finish_metrics(metrics, mode)
        for name, value in metrics.items():
            self._metrics[mode][name] = [value]

    def finish_metrics(self, metrics: dict[str, float], mode: str) -> None:
        """Derive metrics from the reduced ones, in place; `mode`: train or eval."""

    def finish_loss(self, loss: Tensor, aux_loss: Tensor | None, mode: str, aux_steps: int = 1) -> Tensor:
        """Add the experts' auxiliary loss to a micro-batch's, and stop the run if the loss is not finite.

        Args:
            loss: (), the method's. aux_loss: (), a mixture of experts' load-balancing loss of these tokens, or None
                where the model has returned none; read where it is asked for, and then of each micro-batch's tokens,
                as TRL has it: it depends on the split. aux_steps: it is divided by so many.
        """
        if self.aux_loss_enabled:
            loss = self._with_aux_loss(loss, aux_loss, mode, aux_steps)
        # of private rows, a run that stopped for one would tell of it
        if mode == "train" and self.is_in_train and self._private is None:
            self._finite_loss.watch(self, loss)
        return loss
