"""What a run writes and loads: checkpoints, the model in its folder, its card, the hub's copy."""

from pathlib import Path

from safetensors import SafetensorError

from posttrain.adapters import SIDE_FILE
from posttrain.errors import EnvironmentIssue
from posttrain.hub import clean_readme, push_checkpoint, push_run, write_model_card
from posttrain.hub.base_model import adapter_config
from posttrain.log import get_logger
from posttrain.mechanisms.precision import same_precision
from posttrain.privacy import promise as promises
from posttrain.run import best, checkpoints, lock, run_folder, synced_reference, training_state
from posttrain.run.places import check_places


class SavingMixin:
    """Saves checkpoints and models, loads them again and pushes them. Stands on `transformers.Trainer`."""

    # where a checkpoint lies while it is saved
    _saved_in = None
    _said_what_is_sent = False
    # the step at which training came to its end
    _finished_at: int | None = None

    def _claim_folder(self) -> None:
        if not self._has_folder:
            return
        self._check_folder()
        self._check_places()
        if self.is_world_process_zero():
            run_folder.claim(Path(self.args.output_dir), self)
            self._tell_promise()

    def promise(self) -> promises.Promise | None:
        """Return what the run promises about its rows, for the card and for pushes; None of one that is not private."""
        return None

    def _tell_promise(self) -> None:
        """Keep beside the run what it promises; whoever pushes the folder reads there what may leave."""
        promise, folder = self.promise(), Path(self.args.output_dir)
        if promise is not None:
            promises.write(folder, promise)
            if promise.is_refuted:
                get_logger().warning(
                    "the audit's canaries tell that epsilon is at least %.3g (%.0f%% sure), and the steps so far were "
                    "to spend %.3g: something in this run is not as it promises. Do not publish its weights as private",
                    promise.audit["lower_bound"],
                    100 * promise.audit["confidence"],
                    promise.epsilon_of_weights,
                )
            senders = sorted(set(self.args.report_to or ()) - {"none", "tensorboard"})
            if promise.withholds_metrics and senders and not self._said_what_is_sent:
                self._said_what_is_sent = True
                get_logger().warning(
                    "report_to is %s: losses, norms and evaluations of private rows are logged there, without noise; "
                    "the promise does not cover them",
                    ", ".join(senders),
                )
        else:
            # of a run whose place this one takes
            (folder / promises.FILE).unlink(missing_ok=True)

    def _check_folder(self) -> None:
        """Refuse the run folder of another run that may have begun there since construction; before the first write."""
        if not self._folder_is_ours:
            run_folder.check_free(self)
            self._folder_is_ours = True

    def _check_places(self) -> None:
        """Refuse links in the run folder in the places of its files, which may have come since construction.

        A folder that was renamed since the run began there is not made anew.
        """
        lock.check_held(self.args.output_dir)
        check_places(self.args.output_dir, getattr(self.model, "peft_config", None) or ())

    def _rest_optimizer(self) -> None:
        """Have an optimizer that trains at other weights than it ends at, a schedule-free one, put in the latter."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the adapter or model, and push it with `push_to_hub: true`, as TRL's trainers do; all ranks call it.

        No local path is left in the card that PEFT writes. In the run folder, a note says whose model it is.
        """
        self._rest_optimizer()
        folder = Path(output_dir or self.args.output_dir)
        own = folder.resolve() == Path(self.args.output_dir).resolve()
        notes = own and self.is_world_process_zero() and self._has_folder
        if self._has_folder and own:
            self._check_folder()
            self._check_places()
        elif self._has_folder:
            run_folder.check_not_anothers(folder, self)
        try:
            if notes:
                before = run_folder.begin_note(folder, self)
            # not upstream's own push from here: it would come before our changes to what lies there
            super().save_model(output_dir, _internal_call=True)
            if self.is_world_process_zero():
                self._start.saved(folder)
                if own and not hasattr(adapter_config(self.model), "scheme"):
                    # of a run whose place this one takes
                    (folder / SIDE_FILE).unlink(missing_ok=True)
            if notes:
                run_folder.note_model(folder, self, before)
                self._tell_promise()
        except (OSError, SafetensorError, RuntimeError) as error:
            if not checkpoints.is_write_error(error):
                raise
            raise EnvironmentIssue(
                f"the model could not be saved to {folder}: {checkpoints.write_reason(error)}."
            ) from error
        if self.is_world_process_zero():
            self.save_beside(folder, in_checkpoint=_internal_call and output_dir is not None)
            clean_readme(folder, self.args.base_model_id)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # stands on Trainer._save, which under ZeRO-3 is given what trains alone
    def _save(self, output_dir=None, state_dict=None):
        if state_dict is not None:
            state_dict = self._scheme.whole(state_dict)
        super()._save(output_dir, state_dict)

    # stands on DPOTrainer._save_checkpoint, and through it on Trainer's
    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with checkpoints.complete_or_not_there(self, folder) as partial:
            self._saved_in = str(partial.parent)
            try:
                super()._save_checkpoint(model, trial)
                synced_reference.save(self, partial)
            finally:
                self._saved_in = None
        if self._has_folder and self.is_world_process_zero():
            self._tell_promise()
        if self.args.push_to_hub:
            push_checkpoint(self, folder)

    # stands on Trainer._get_output_dir, where upstream saves checkpoints
    def _get_output_dir(self, trial):
        return self._saved_in or super()._get_output_dir(trial)

    # stands on Trainer._finalize_training, which deletes whatever is named as a checkpoint is
    def _finalize_training(self, trial, num_train_samples, start_time):
        self._stop_early.end()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit
        self._finished_at = self.state.global_step
        best.keep_alone(self, Path(self._get_output_dir(trial)))
        return output

    # stands on Trainer._load_from_checkpoint
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._start.converts:
            self._start.load(resume_from_checkpoint)
        else:
            answered = training_state.answered(resume_from_checkpoint, "config.json or the weights", otherwise="")
            with answered, same_precision(model if model is not None else self.model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.attach_adapter()

    # stands on Trainer._load_best_model
    def _load_best_model(self):
        if self._start.converts and not self.is_deepspeed_enabled:
            return self._start.load(self.state.best_model_checkpoint)
        with same_precision(self.model):
            return super()._load_best_model()

    # stands on Trainer.push_to_hub: saves first, on all ranks, and never fails the run
    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Save, write the card and push to the hub; a push that fails is a warning with the command that retries.

        `private`: of a repository that is made; `hub_private_repo` by default.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return push_run(self, commit_message, blocking=blocking, token=token, revision=revision, private=private)

    # stands on Trainer.init_hf_repo, which would ask the hub again, once and without another try
    def init_hf_repo(self, token=None, private=None):
        self.hub_model_id = self.hub_destination.repo_id
        self.push_in_progress = None

    # stands on Trainer._push_from_checkpoint, which comes before the checkpoint is in its place
    def _push_from_checkpoint(self, checkpoint_folder):
        pass

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **evaluated):
        """Write `README.md` into the output folder: what was trained, on what, how, and how to load it.

        `evaluated`: the keywords of `posttrain.hub.write_model_card` that name the rows of the evaluation.
        """
        if self.is_world_process_zero():
            if self._has_folder:
                self._check_places()
            write_model_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags, **evaluated)
