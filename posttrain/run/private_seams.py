"""Where a private run enters the trainer's loop; of a run that is not private nothing changes."""

import torch
from torch import Tensor

from posttrain.privacy.plan import Plan
from posttrain.privacy.promise import Promise
from posttrain.run import private_settings
from posttrain.run.private import PrivateRun


class PrivateMixin:
    """Gives a trainer the seams of a private run. Stands on `transformers.Trainer`.

    A run is private where its config has a `privacy`. Its method sets `_private` at the end of its construction, and
    has `unit_losses`: the losses (U,) of a batch's units, each of its own rows alone.
    """

    _private: PrivateRun | None = None
    # of the steps of a private run; None where the tokens of its rows are not known yet
    _plan: Plan | None = None

    def _follow_plan(self, args, made: Plan | None) -> None:
        """Note the plan of a private run's steps and have its own config follow; before the parent's constructor."""
        self._plan = made
        if args.privacy is not None:
            private_settings.follow(args, made)
            # no loss of a step is anything but a number, and upstream would wait for the device to ask each one
            args.logging_nan_inf_filter = False
            # stands on Trainer.loss_is_scaled_for_ga: a step is divided once, by the expected number of units
            self.loss_is_scaled_for_ga = True

    def _plan_anew(self) -> None:
        """Plan a private run's steps for the rows that are trained on, behind the parent's constructor."""
        if self.args.privacy is not None:
            self._plan = private_settings.planned_anew(self.args, self.train_dataset, self._plan)

    def told_rows(self, real: Tensor, losses: Tensor) -> Tensor:
        """Return which rows (B,) of a batch figures are of: those that are data, and in a private run are numbers.

        One that is no number would make every mean one; it is counted with its gradient, and stops nothing.

        Args:
            real: (B,) which rows are data. losses: (B,).
        """
        return real if self._private is None else real & torch.isfinite(losses)

    def sum_of_rows(self, losses: Tensor, real: Tensor) -> Tensor:
        """Return the sum of a private micro-batch's losses (B,), without those that are no number; `real`: as above."""
        return torch.where(self.told_rows(real, losses), losses, 0.0).sum()

    # stands on Trainer.train
    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._private is not None:
                self._private.end()

    # stands on Trainer.get_train_dataloader; its batches are not accelerate's to cut and to complete
    def get_train_dataloader(self):
        return super().get_train_dataloader() if self._private is None else self._private.dataloader()

    # stands on Trainer._get_grad_norm, which every step calls before its callbacks and its update: the norm that is
    # logged is that of the noisy gradient
    def _get_grad_norm(self, model, grad_norm=None):
        if self._private is not None:
            self._private.finish_step()
        return super()._get_grad_norm(model, grad_norm)

    # stands on Trainer._sync_replicated_trainable_parameters, whose hooks would reduce gradients that are not there
    def _sync_replicated_trainable_parameters(self, model):
        if self._private is None:
            super()._sync_replicated_trainable_parameters(model)
        else:
            self._private.sync_weights()

    def promise(self) -> Promise | None:
        return None if self._private is None else self._private.promise()
