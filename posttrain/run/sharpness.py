"""Sharpness-aware minimisation in a run: a pass over the whole step's window, then training at the weights it finds."""

import contextlib
from collections import defaultdict
from collections.abc import Callable

import torch

from posttrain.mechanisms.metrics import MeanMetrics
from posttrain.mechanisms.sharpness import Perturbed, ascent


class Sharpness:
    """Perturbs a trainer's weights for the micro-batches of each optimiser step, and puts them back before its update.

    The gradient of the ascent is that of the whole step, over all its micro-batches on all ranks, so the update does
    not depend on the batch split. Both passes draw the same dropout and the same noise.
    """

    def __init__(self, trainer) -> None:
        self._trainer = trainer
        self._window, self._perturbed, self._clean = None, None, 0.0
        self._trained = 0.0

    def begin(self, batches: list[dict]) -> None:
        """Note the micro-batches of the step to come, as they are trained on."""
        self._window = batches

    @contextlib.contextmanager
    def micro_batch(self, model, train: Callable[[dict], torch.Tensor]):
        """Enter a micro-batch's forward and backward, at moved weights; yields a list to put its loss into.

        `train`: runs forward and backward of a micro-batch and returns its loss, ().
        """
        losses: list[torch.Tensor] = []
        try:
            if self._window is not None:
                # not as the window is drawn: upstream restores a resumed run's random state after that
                batches, self._window = self._window, None
                self._ascend(model, batches, train)
            yield losses
        except BaseException:
            self.put_back()
            raise
        self._trained += sum(loss.detach().double() for loss in losses)
        if self._trainer.accelerator.sync_gradients:
            self.put_back()
            increase = torch.as_tensor(self._trained - self._clean)
            self._trainer._means["train"].add_sum("sam/loss_increase", increase, 1)
            self._trained = 0.0

    def _ascend(self, model, batches: list[dict], train: Callable[[dict], torch.Tensor]) -> None:
        trainer = self._trainer
        accelerator, args = trainer.accelerator, trainer.args
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        apart = accelerator.no_sync(model) if accelerator.num_processes > 1 else contextlib.nullcontext()
        devices = [accelerator.device] if accelerator.device.type != "cpu" else []
        with torch.random.fork_rng(devices=devices), self._unseen(), apart:
            self._clean = sum(train(batch).detach().double() for batch in batches)
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        if accelerator.num_processes > 1:
            gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
            gradients = [accelerator.reduce(gradient, reduction="mean") for gradient in gradients]
        perturbation, norm = ascent(gradients, args.sam_rho, args.sam_mask_share)
        self._perturbed = Perturbed(parameters, perturbation)
        trainer._metrics["train"]["sam/gradient_norm"].append(norm)

    @contextlib.contextmanager
    def _unseen(self):
        """Keep what the pass counts and measures apart from the run's own."""
        trainer = self._trainer
        kept = trainer._metrics["train"], trainer._means["train"], trainer._total_train_tokens
        trainer._metrics["train"], trainer._means["train"] = defaultdict(list), MeanMetrics()
        try:
            yield
        finally:
            trainer._metrics["train"], trainer._means["train"], trainer._total_train_tokens = kept

    def put_back(self) -> None:
        """Put the weights back to what they were before the step, where they are moved."""
        if self._perturbed is not None:
            self._perturbed.put_back()
            self._perturbed = None
