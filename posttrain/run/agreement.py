"""Gradient agreement filtering in a run: micro-gradients are taken out after each backward, and their mean put back."""

import contextlib

import torch
from accelerate.utils import broadcast

from posttrain.log import get_logger
from posttrain.mechanisms.gradient_agreement import AgreeingMean


class Agreement:
    """Filters the micro-gradients of each optimiser step of a trainer.

    Their order is that of the step's rows in one process: the first micro-batch of each rank, then the second, and so
    on. Each rank is sent the others' micro-gradients, so that all keep the same sum, and the result is that of one
    process with as many micro-batches of the same rows.

    Attributes:
        skipped: whether the last step was left out, as no two micro-gradients agreed.
    """

    def __init__(self, trainer, tau: float) -> None:
        self._trainer, self._tau = trainer, tau
        self._mean, self.skipped = AgreeingMean(tau), False

    @contextlib.contextmanager
    def micro_batch(self, model):
        """Enter a micro-batch's forward and backward; its gradient is taken out at the end, or the step's put in."""
        accelerator = self._trainer.accelerator
        # DDP would add up over ranks before anybody has looked at a rank's own
        apart = accelerator.no_sync(model) if accelerator.num_processes > 1 else contextlib.nullcontext()
        with apart:
            yield
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._take(parameters)
        if accelerator.sync_gradients:
            self._finish(parameters)

    def _take(self, parameters: list) -> None:
        own = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        ranks = self._trainer.accelerator.num_processes
        if ranks == 1:
            self._mean.add(own)
            return
        own = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, own, strict=True)]
        for rank in range(ranks):
            mine = rank == self._trainer.accelerator.process_index
            sent = [gradient.clone() if mine else torch.empty_like(gradient) for gradient in own]
            self._mean.add(broadcast(sent, from_process=rank))

    def _finish(self, parameters: list) -> None:
        trainer, mean, self._mean = self._trainer, self._mean, AgreeingMean(self._tau)
        self.skipped = not mean.agrees
        metrics = trainer._metrics["train"]
        if mean.count:
            metrics["gradient_agreement/accepted"].append(mean.accepted / mean.count)
        if mean.compared:
            metrics["gradient_agreement/distance"].append(mean.distances / mean.compared)
        metrics["gradient_agreement/skipped"].append(float(self.skipped))
        if self.skipped:
            # without a gradient no optimizer moves a weight, decay included
            get_logger().debug("step %d skipped: no two micro-gradients agree", trainer.state.global_step + 1)
            return
        # the mean over ranks, which DDP would have taken; 1.0 where all are accepted by one process
        factor = mean.factor / trainer.accelerator.num_processes
        for parameter, gradient in zip(parameters, mean.sum, strict=True):
            parameter.grad = gradient if gradient is None or factor == 1 else gradient.mul_(factor)
