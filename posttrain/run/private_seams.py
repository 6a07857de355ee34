"""Where a private run enters the trainer's loop; of a run that is not private nothing changes."""

from posttrain.privacy.promise import Promise
from posttrain.run.private import PrivateRun


class PrivateMixin:
    """Gives a trainer the seams of a private run. Stands on `transformers.Trainer`.

    A method makes its run private by setting `_private` at the end of its construction, and gives it `unit_losses`:
    the losses (U,) of a batch's units, each of its own rows alone.
    """

    _private: PrivateRun | None = None

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
