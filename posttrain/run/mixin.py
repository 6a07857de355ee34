"""What every trainer's run has: a method's seams, exact resumption, watches over loss and gradients, evaluation."""

import contextlib
import math
from pathlib import Path

from accelerate.utils import broadcast_object_list, is_peft_model

from posttrain.config.setting import before_declared
from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.run import (
    checkpoints,
    devices,
    evaluation,
    lock,
    own_settings,
    preemption,
    run_folder,
    schedule,
    synced_reference,
    training_state,
)
from posttrain.run.checkpoint_files import check_adapter_fits, is_complete
from posttrain.run.construction import ConstructionMixin
from posttrain.run.construction import without_folder as without_folder
from posttrain.run.identity import differing, identity, update_settings
from posttrain.run.markers import MARKER, content_of
from posttrain.run.passes import PassesMixin
from posttrain.run.places import check_shared
from posttrain.run.private_seams import PrivateMixin
from posttrain.run.saving import SavingMixin
from posttrain.run.watches import LiveGradients, stop


class RunMixin(PrivateMixin, ConstructionMixin, SavingMixin, PassesMixin):
    """Runs any family's trainer: construct, train, resume, save, push. Stands on `transformers.Trainer`.

    A method has these seams, whatever its family: `around_policy_forward`, `method_state` and `load_method_state`,
    `attach_adapter`, `save_beside`.
    """

    # whether a save may fall on another step than the settings say
    saves_may_wait = False
    _said_no_aux_loss = False
    # the checkpoint that training goes on from
    resumed_from: Path | None = None
    # of a metric that an evaluation has measured nowhere
    no_value = math.nan

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

    @property
    def weights_have_noise(self) -> bool:
        """Return whether an adapter adds noise to the weights of forwards that are trained; others have none."""
        return self._scheme.noise_kind != "none"

    @property
    def weight_noise_kind(self) -> str:
        """Return the kind of that noise: gaussian, uniform or none."""
        return self._scheme.noise_kind

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

    def begin_step(self, batches: list[dict]) -> None:
        """Note the micro-batches of the step to come, once each knows what its loss needs of the others."""
        if self._sharpness is not None and batches:
            self._sharpness.begin(batches)

    def put_weights_back(self) -> None:
        """Put the weights back to what the last update made of them, where they are moved for the step's gradient."""
        if self._sharpness is not None:
            self._sharpness.put_back()

    def calibration_ids(self, rows):
        """Yield the tokens of rows of data, each sequence on its own, that an adapter is calibrated on."""
        for row in rows:
            ids, start = row["input_ids"], 0
            # of a packed row each of its sequences
            for length in row.get("seq_lengths") or [len(ids)]:
                yield list(ids[start : start + length])
                start += length

    def method_state(self) -> dict:
        """Return what a method needs beside weights to go on from a checkpoint, as plain JSON; rank 0's is kept."""
        return {} if self._private is None else {"privacy": self._private.state()}

    def load_method_state(self, state: dict) -> None:
        """Restore what `method_state` returned when the checkpoint was written; empty if another method wrote it."""
        if self._private is not None:
            self._private.load(state.get("privacy") or {})
        elif state.get("privacy") and self.args.check_resume:
            raise ConfigError(
                "the checkpoint is of a private run, and this one is not: its steps would end the promise. Give the "
                "private settings of that run, or set `check_resume: false`."
            )

    def found_by_method(self) -> dict[str, object]:
        """Return what a method found out when training began, by name, for card and report."""
        return {}

    def found_in_training(self) -> dict[str, object]:
        """Return what the rule of the steps' gradients came to in a training that has ended, by name, for the card."""
        return {} if self._agreement is None else self._agreement.found()

    def may_stop_here(self) -> bool:
        """Return whether a checkpoint of this step can be gone on from; asked at the end of a step."""
        return True

    def attach_adapter(self) -> None:
        """Change the adapter's modules as a method needs, after construction and after a checkpoint's weights load."""

    def save_beside(self, folder: Path, in_checkpoint: bool) -> None:
        """Write a method's own files beside a saved model or adapter; called on the main rank."""

    def get_train_dataloader(self):
        return preemption.keep_workers(super().get_train_dataloader())

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train as `transformers.Trainer.train` does, resuming only from complete checkpoints.

        Args:
            resume_from_checkpoint: a path; True for the newest complete checkpoint in `output_dir`; "auto" for that one
                if there is any. One without optimizer, schedule or random state is resumed from with
                `resume_weights_only`, one that another library wrote by its path, with `check_resume: false`.

        Raises:
            ConfigError: no complete checkpoint where one is asked for, or one of another method, data or batch split;
                fewer steps than it has, or more than its schedule has a rate for; something that is not ours where
                this run would save; a metric_for_best_model that the evaluation has not.
            DivergedError: the loss or the gradient became NaN or infinite, or adapter tensors get no gradient.
            Preempted: a signal came or `max_minutes` are over; a checkpoint of the last step is there.
        """
        with lock.held(self.args.output_dir, self.accelerator, self) if self._has_folder else contextlib.nullcontext():
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint, *args, **kwargs):
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._schedule.resumed, self.resumed_from = None, checkpoint
        if checkpoint is not None:
            now = self._identity() | update_settings(self) if self.args.check_resume else None
            before = before_declared(type(self.args))
            content = checkpoints.read(checkpoint, now, self.args.resume_weights_only, before)
            if not self.args.check_resume and not self.args.resume_weights_only:
                own_settings.check(self, checkpoints.settings_of(content) if "identity" in content else None)
            state = content.get("state", {})
            self._total_train_tokens = state.get("num_tokens", 0)
            self.load_method_state(state.get("method") or {})
            then = state.get("schedule") or {"total": checkpoints.planned_steps(checkpoint), "knots": []}
            self._schedule.resumed = schedule.Schedule.of(then)
            if not self.args.check_resume and self._start.converts and not is_complete(checkpoint):
                raise ConfigError(
                    f"the checkpoint {checkpoint} was not written by posttrain, and init_lora_weights moves the "
                    "base weights, of which it holds no trace. Resume it with the library that wrote it."
                )
            training_state.check_scaler(self.accelerator.scaler, checkpoint)
            whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            # one that is converted on saving has twice the rank there
            check_adapter_fits(self.model, checkpoint, shapes=whole and not self._start.converts)
            if not self.args.check_resume and not self.args.resume_weights_only:
                checkpoints.warn_of_missing_random_state(checkpoint, self.args.world_size)
            self._start.resume(checkpoint, self.state.global_step > 0)
            self._scheme.restore(checkpoint)
            synced_reference.load(self, checkpoint)
        if checkpoint is not None and self.args.ignore_data_skip:
            get_logger().warning(
                "ignore_data_skip: going on from %s with the rows that the run began with; it is not the run that was "
                "never interrupted",
                checkpoint,
            )
        self._claim_folder()
        self._live_gradients = None
        if self._private is not None:
            self._private.begin(checkpoint)
        if self._agreement is not None:
            self._agreement.begin()
        watching = self._stop_early.watching() if self._has_folder else contextlib.nullcontext()
        try:
            with watching:
                output = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        except KeyError as error:
            # which metrics there are is known at the first evaluation, where upstream looks the best one up
            if "metric_for_best_model" not in str(error):
                raise
            raise ConfigError(str(error.args[0])) from None
        if self._live_gradients and self.step_moved:
            self._live_gradients.after_step(self)
        if self._agreement is not None:
            self._agreement.end()
        return output

    def _checkpoint_to_resume(self, wanted):
        """Return the checkpoint to go on from, found and read whole by the main process, or None."""
        found, problem = None, None
        if self.accelerator.is_main_process:
            try:
                found = self._found_checkpoint(wanted)
            except ConfigError as error:
                problem = error
        if self.accelerator.num_processes > 1:
            told = [found, problem and str(problem)]
            broadcast_object_list(told)
            found, problem = told[0], problem or (told[1] and ConfigError(told[1]))
        if problem:
            raise problem
        if found is not None and self.accelerator.num_processes > 1:
            check_shared(found)
        return found

    def _found_checkpoint(self, wanted):
        args, weights_only = self.args, self.args.resume_weights_only
        fits = None if weights_only or not args.check_resume else self._misfit
        found = checkpoints.find(args.output_dir, wanted, args.check_resume, weights_only, by_content=True, fits=fits)
        if found is not None:
            checkpoints.refuse_damaged(found, weights_only, by_content=True, fits=fits)
        if str(wanted).lower() not in ("auto", "true"):
            return found
        run_folder.check_unfinished(self, found)
        if found is not None and args.overwrite and str(wanted).lower() == "auto":
            then = checkpoints.settings_of(checkpoints.read(found, None, args.resume_weights_only))
            told = differing(self._identity() | update_settings(self), then, before_declared(type(args)))
            if told and args.check_resume:
                get_logger().warning("%s is of another run (%s): overwrite is true, this one starts anew", found, told)
                return None
        over = checkpoints.passed_over(args.output_dir, found, weights_only, fits)
        if over:
            get_logger().warning(
                "resume_from_checkpoint is %s: %s. Passed over: %s",
                wanted,
                f"going on from {found}" if found else "starting anew",
                over,
            )
        return found

    def _misfit(self, checkpoint: Path) -> str:
        """Say why a checkpoint of this very run could not be loaded; of another run, its settings tell."""
        then = checkpoints.settings_of(content_of(checkpoint / MARKER)) if is_complete(checkpoint) else {}
        if differing(self._identity() | update_settings(self), then, before_declared(type(self.args))):
            return ""
        return training_state.misfit(checkpoint, self)

    def columns_in_identity(self) -> set[str]:
        """Return the columns of training rows that reach a batch, but for those that a model computed.

        What a model computes differs in rounding on another machine, and follows from the rest of the identity.
        """
        self._set_signature_columns_if_needed()
        return {name for name in self._signature_columns if not name.startswith("ref_")} - self.computed_columns()

    def computed_columns(self) -> set[str]:
        """Return the columns of training rows that a model computed."""
        return set()

    def own_identity(self) -> dict:
        """Return what a family's run must share with the one it resumes beside its settings, as plain JSON."""
        return {}

    def _identity(self) -> dict:
        if self._known_identity is None:
            self._known_identity = identity(self)
        return self._known_identity

    @property
    def step_moved(self) -> bool:
        """Return whether the last optimiser step could move the weights."""
        return self._agreement is None or not self._agreement.skipped

    # stands on Trainer.create_scheduler, which is called with the number of steps once a checkpoint's state is there
    def create_scheduler(self, num_training_steps, optimizer=None):
        current, given = self._schedule, self.lr_scheduler is not None
        current.now = schedule.Schedule(num_training_steps)
        if current.resumed is not None and not given:
            current.now = schedule.continued(self.args, current.resumed, self.state.global_step, num_training_steps)
        scheduler = super().create_scheduler(current.now.total, optimizer)
        if not given:
            schedule.bend(scheduler, current.now)
        return scheduler

    # stands on Trainer._load_optimizer_and_scheduler, and on GRPOTrainer's
    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not self.args.resume_weights_only:
            if checkpoint is not None and (told := training_state.misfit(Path(checkpoint), self)):
                raise ConfigError(
                    f"optimizer.pt or scheduler.pt of the checkpoint {checkpoint} cannot be loaded into this run: "
                    f"{told}. Resume from another checkpoint, or go on from its weights alone: "
                    "`resume_weights_only: true`."
                )
            whole = checkpoint is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            own = own_settings.fresh(self) if whole else None
            with training_state.answered(checkpoint, "optimizer.pt or scheduler.pt"):
                super()._load_optimizer_and_scheduler(checkpoint)
            if own is not None:
                own_settings.check_whole(self, own, checkpoint)
                if not self.args.check_resume:
                    own_settings.put_back(self, own)
            if checkpoint is None or not self._schedule.changed:
                return
        else:
            get_logger().warning(
                "resume_weights_only: going on from the weights of %s at step %d with a new optimizer; the run is not "
                "the one that was never interrupted",
                checkpoint,
                self.state.global_step,
            )
        schedule.move_to(self.lr_scheduler, self.state.global_step)

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

    # stands on Trainer.evaluation_loop, which alone is told the name of the set, by evaluate and predict alike
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        devices.check_is_placed(self)
        self._claim_folder()
        evaluation.forget(self)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self.finish_evaluation(dataloader, description)
        output.metrics.update(evaluation.take_metrics(self, metric_key_prefix))
        return output

    def finish_evaluation(self, dataloader, description: str) -> None:
        """Add a family's own metrics to TRL's at the end of an evaluation; all ranks call it."""

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
