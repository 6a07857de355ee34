"""The optimiser step in the trainer's loop: how micro-batches become its gradient, and who watches over it."""

import math

from accelerate.utils import is_peft_model

from posttrain.log import get_logger
from posttrain.mechanisms.window import Window
from posttrain.run import preemption
from posttrain.run.watches import LiveGradients, stop


class StepsMixin:
    """Takes a trainer's steps, whatever its method. Stands on `transformers.Trainer`.

    The rules by which micro-batches become a step's gradient are a private run, an agreement of gradients, and weights
    that are moved for the gradient; a run has one of them at most.
    """

    _said_no_aux_loss = False

    # stands on Trainer.training_step
    def training_step(self, model, inputs, *args, **kwargs):
        with self._scheme.during_step(), self._idle_casts_off():
            loss = self._micro_batch(model, inputs, *args, **kwargs)
        self._scheme.after_step()
        self._finite_loss.ask(self)
        if self._live_gradients:
            self._live_gradients.after_backward(self)
        return loss

    @property
    def reads_gradients_in_steps(self) -> bool:
        """Return whether a rule over the step's gradients reads them before all its micro-batches are through."""
        return self._agreement is not None or self._sharpness is not None

    def _micro_batch(self, model, inputs, *args, **kwargs):
        """Run forward and backward of a micro-batch, under the rules by which its gradient becomes the step's."""
        train_on = super().training_step

        def train(model, inputs, *args, **kwargs):
            loss = train_on(model, inputs, *args, **kwargs)
            # the batches of a step are kept until its end; a batch of prompts is a list
            if isinstance(inputs, dict) and inputs.get("packed") is not None:
                inputs["packed"].drop_masks()
            return loss

        if self._private is not None:
            return self._private.micro_batch(inputs, lambda: train(model, inputs, *args, **kwargs))
        if self._agreement is not None:
            with self._agreement.micro_batch(model):
                return train(model, inputs, *args, **kwargs)
        if self._sharpness is not None:
            with self._sharpness.micro_batch(model, lambda batch: train(model, batch, *args, **kwargs)) as losses:
                losses.append(train(model, inputs, *args, **kwargs))
            return losses[0]
        return train(model, inputs, *args, **kwargs)

    def begin_step(self, batches: list[dict], window: Window) -> None:
        """Note the micro-batches of the step to come, once each knows what its loss needs of the others."""
        if self._private is not None:
            self._private.step_rows = window.rows
        if self._sharpness is not None and batches:
            self._sharpness.begin(batches)

    def put_weights_back(self) -> None:
        """Put the weights back to what the last update made of them, where they are moved for the step's gradient."""
        if self._sharpness is not None:
            self._sharpness.put_back()

    @property
    def step_moved(self) -> bool:
        """Return whether the last optimiser step could move the weights."""
        return self._agreement is None or not self._agreement.skipped

    def found_in_training(self) -> dict[str, object]:
        """Return what the rule of the steps' gradients came to in a training that has ended, by name, for the card."""
        return {} if self._agreement is None else self._agreement.found()

    def get_train_dataloader(self):
        return preemption.keep_workers(super().get_train_dataloader())

    # stands on Trainer.get_batch_samples, the first call of an optimiser step; each mixin's own comes after it
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:
            # resumed from its last step: upstream would take one more
            self.control.should_training_stop = True
            return [], None
        self._watch_gradients()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # stands on Trainer._clip_grad_norm, the last call before the optimiser's step
    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        # in fp16 the gradient scaler skips such steps by itself
        if norm is None or self.skips_step(model, norm):
            return norm
        if not self.args.fp16 and not math.isfinite(norm):
            stop(self, "the gradient")
        return norm

    def skips_step(self, model, norm) -> bool:
        """Return whether a step is left out for its gradient norm before clipping; the gradients are gone then."""
        return False

    def _watch_gradients(self) -> None:
        if self._private is not None:
            self._private.begin_step()
            return
        if self._live_gradients is None:
            watched = self.args.check_gradients and is_peft_model(self.model)
            self._live_gradients = LiveGradients(self.model) if watched else False
        elif self._live_gradients and self.step_moved and self._live_gradients.after_step(self):
            self._live_gradients = False
        if self._live_gradients:
            self._live_gradients.before_step(self)

    def _with_aux_loss(self, loss, aux_loss, mode: str, steps: int = 1):
        """Add a mixture of experts' load-balancing loss to a micro-batch's; of its own tokens, as TRL has it."""
        if aux_loss is None:
            if not self._said_no_aux_loss:
                get_logger().warning(
                    "%s returns no auxiliary loss of its experts, so router_aux_loss_coef %g has no effect",
                    type(self.accelerator.unwrap_model(self.model)).__name__, self.router_aux_loss_coef,
                )  # fmt: skip
                self._said_no_aux_loss = True
            return loss
        self._means[mode].add_sum("aux_loss", aux_loss.detach().float(), 1)
        return loss + self.router_aux_loss_coef * aux_loss / steps
