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
        steps: how many steps this training has taken.
        left_out: how many of them were skipped.
    """

    def __init__(self, trainer, tau: float) -> None:
        self._trainer, self._tau = trainer, tau
        self._mean, self.skipped = AgreeingMean(tau), False
        self.begin()

    def begin(self) -> None:
        """Begin to count the steps of a training."""
        self.steps, self.left_out, self._distances, self._compared = 0, 0, 0.0, 0

    def end(self) -> None:
        """Say how many steps were skipped where all were, so that nothing was trained."""
        if self.steps and self.left_out == self.steps:
            get_logger().warning(
                "gradient_agreement %g: all %d steps were skipped, as no two micro-gradients of a step agreed, so no "
                "weight has moved. Their mean cosine distance was %.3f: set gradient_agreement above it, or make "
                "micro-batches larger",
                self._tau, self.steps, self._distances / max(self._compared, 1),
            )  # fmt: skip

    def found(self) -> dict[str, object]:
        """Return how many steps were skipped, for the card."""
        return {"steps skipped by gradient_agreement": f"{self.left_out} of {self.steps}"} if self.steps else {}

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
        self.steps, self.left_out = self.steps + 1, self.left_out + self.skipped
        self._distances, self._compared = self._distances + mean.distances, self._compared + mean.compared
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
