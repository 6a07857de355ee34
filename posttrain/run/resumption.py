"""Training from the start or from a checkpoint: which one, whether it is of this run, and what is put back from it."""

import contextlib
from pathlib import Path

from accelerate.utils import broadcast_object_list

from posttrain.config.setting import before_declared
from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.run import (
    checkpoints,
    lock,
    own_settings,
    run_folder,
    schedule,
    synced_reference,
    training_state,
)
from posttrain.run.checkpoint_files import check_adapter_fits, is_complete
from posttrain.run.identity import differing, identity, update_settings
from posttrain.run.markers import MARKER, content_of
from posttrain.run.places import check_shared


class ResumptionMixin:
    """Trains, and goes on exactly from a checkpoint of the same run. Stands on `transformers.Trainer`."""

    # the checkpoint that training goes on from
    resumed_from: Path | None = None

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
        return {} if self._plan is None else {"privacy_units": self._plan.units}

    def _identity(self) -> dict:
        if self._known_identity is None:
            self._known_identity = identity(self)
        return self._known_identity

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
