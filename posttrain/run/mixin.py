"""What every trainer's run has: complete checkpoints and exact resumption, watches over loss and gradients, the hub."""

import contextlib
import contextvars
import inspect
import math
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from safetensors import SafetensorError
from trl.trainer.utils import get_config_model_id

from posttrain.compat import keep_4bit_weights_trainable
from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.hub import clean_readme, preflight, push_checkpoint, push_run, write_model_card
from posttrain.log import get_logger
from posttrain.mechanisms.base_digests import base_digests
from posttrain.mechanisms.precision import same_precision
from posttrain.models import embedded_name, resolve_model
from posttrain.run import (
    checkpoints,
    checks,
    evaluation,
    run_folder,
    schedule,
    start,
    synced_reference,
    upstream_configs,
)
from posttrain.run.checkpoint_files import check_adapter_fits, is_complete
from posttrain.run.identity import differing, identity, reference_digest, update_settings
from posttrain.run.prepared import Prepared
from posttrain.run.report import RunReport
from posttrain.run.sharing import check_setting
from posttrain.run.watches import FiniteLoss, LiveGradients, stop

_FOLDERLESS = contextvars.ContextVar("folderless", default=False)


@contextlib.contextmanager
def without_folder():
    """Let trainers that are built inside write no note, card or report: several clients of one process share a run.

    Their `save_strategy` is to be `no`; `save_model` writes the weights alone.
    """
    token = _FOLDERLESS.set(True)
    try:
        yield
    finally:
        _FOLDERLESS.reset(token)


# Arguments that TRL's trainers had, and what stands in their place
_FORMER_ARGUMENTS = {
    "tokenizer": "write processing_class=...",
    "max_prompt_length": "leave it out; max_length in args cuts prompt and answer together",
    "dataset_text_field": "leave it out; the rows have columns of known names",
    "formatting_func": "leave it out, and make the rows' columns with datasets.Dataset.map",
}


class RunMixin:
    """Runs any family's trainer: construct, train, resume, save, push. Stands on `transformers.Trainer`.

    The order of a constructor stands once, in `_build`. A family fills in its steps: `_begin` before the parent's
    constructor, `_place` behind it, `_complete` at the end. A method has these seams, whatever its family:
    `around_policy_forward`, `method_state` and `load_method_state`, `attach_adapter`, `save_beside`.
    """

    _config_class: type
    # whether a save may fall on another step than the settings say
    saves_may_wait = False
    _said_no_aux_loss = False
    # of a metric that an evaluation has measured nowhere
    no_value = math.nan

    def _build(self, model, args, peft_config, prepare: Callable, construct: Callable) -> None:
        """Construct the trainer, in the one order that every family keeps.

        Args:
            prepare: called with the model, the settings and the model's config; returns a `Prepared`.
            construct: called with the model, the settings and that; runs the parent's constructor.
        """
        model, args, config = self._check_settings(model, args, peft_config)
        ready = prepare(model, args, config)
        self._begin_run(self._preflight(model, args), args)
        self._begin(ready)
        with checks.upstream_refusals():
            construct(model, args, ready)
        checks.check_parallelism(self.accelerator)
        self._place(ready)
        # the run's folder may be another's, which is asked before anything long
        self._finish_construction()
        self._complete(ready)

    def _begin(self, ready: Prepared) -> None:
        """Set a family's attributes, before the parent's constructor calls its methods."""

    def _place(self, ready: Prepared) -> None:
        """Set up what belongs to the model and the batches, now that both are there."""

    def _complete(self, ready: Prepared) -> None:
        """Do what may take long, once the run folder is known to be free."""

    def _check_settings(self, model, args, peft_config):
        """Check and return the model (an id resolved to what can be loaded), the settings and the model's config."""
        self._start, self._peft_config, self._has_folder = None, peft_config, not _FOLDERLESS.get()
        output_dir = self._default_folder(model) if args is None else None
        args = upstream_configs.check_args(args, self._config_class, output_dir)
        if self._has_folder:
            run_folder.check_args(args, type(self).__name__)
            checks.check_output_dir(args.output_dir)
        if peft_config is not None:
            checks.check_lora(peft_config)
        checks.check_here(args)
        start.check_adapter(model, peft_config, args, self._live_reference(args))
        if isinstance(model, str):
            model = resolve_model(model)
        config = model.config if isinstance(model, torch.nn.Module) else checks.load_config(model, args)
        checks.check_tying(peft_config, config)
        if self._has_folder:
            run_folder.check_start_stays(args, model)
        check_setting(args, config, peft_config)
        return model, args, config

    def _live_reference(self, args) -> bool:
        """Return whether an adapter's reference is the policy itself, with its adapter off or replaced."""
        return False

    def _note_start(self) -> None:
        # TRL's constructor may forward the reference before it returns, so whoever comes first
        if self._start is None:
            self._start = start.Start(self, self._peft_config, self._live_reference(self.args))

    @classmethod
    def _default_folder(cls, model) -> str:
        """Return the output folder where no settings are given, as TRL names it: MODEL-DPO."""
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        parent = next(kind for kind in cls.__mro__ if kind.__module__.startswith("trl."))
        return f"{(embedded_name(name) or name).split('/')[-1].split(':')[-1]}-{parent._name}"

    def _by_name(self, rest: tuple, kwargs: dict) -> dict:
        """Return `kwargs` with the arguments given by position behind `processing_class`, under TRL's names."""
        parent = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("trl."))
        known = list(inspect.signature(parent.__init__).parameters)
        names = known[known.index("processing_class") + 1 :]
        if len(rest) > len(names):
            raise TypeError(
                f"{type(self).__name__} takes {len(names)} arguments behind processing_class, not {len(rest)}."
            )
        given = dict(zip(names, rest, strict=False))
        twice = sorted(given.keys() & kwargs)
        if twice:
            raise TypeError(f"{type(self).__name__} got {', '.join(twice)} twice, by position and by name.")
        for name in kwargs.keys() - set(known):
            remedy = _FORMER_ARGUMENTS.get(name)
            if remedy is None and name in self._config_class.__dataclass_fields__:
                remedy = f"it is a setting: {self._config_class.__name__}({name}=...), given as args"
            raise TypeError(f"{type(self).__name__} has no argument {name!r}; {remedy or f'it has {known[1:]}'}.")
        return kwargs | given

    def _preflight(self, model, args):
        """Return the hub repository that the run will be pushed to; None where it will not."""
        if not self._has_folder:
            return None
        return preflight(args, model, is_adapter=self._peft_config is not None or isinstance(model, PeftModel))

    def _begin_run(self, hub_destination, args) -> None:
        """Set the attributes of a run, before the parent's constructor."""
        start.begin(self._peft_config, args)
        self.hub_destination = hub_destination
        self._schedule = schedule.Current()
        self._known_identity, self._folder_is_ours = None, False
        self._finite_loss, self._live_gradients = FiniteLoss(), None

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

    @contextlib.contextmanager
    def policy_forward(self):
        """Enter the policy's forward whose loss is backpropagated; every family does so around it.

        A forward without gradient, or of a model in eval mode, goes through unchanged, also within.
        """
        armed = self.model.training and torch.is_grad_enabled()
        with self.around_policy_forward() if armed else contextlib.nullcontext():
            yield

    def around_policy_forward(self):
        """Return the context that a method puts around that forward and no other; none by default."""
        return contextlib.nullcontext()

    def method_state(self) -> dict:
        """Return what a method needs beside weights to go on from a checkpoint, as plain JSON; rank 0's is kept."""
        return {}

    def load_method_state(self, state: dict) -> None:
        """Restore what `method_state` returned when the checkpoint was written; empty if another method wrote it."""

    def attach_adapter(self) -> None:
        """Change the adapter's modules as a method needs, after construction and after a checkpoint's weights load."""

    def save_beside(self, folder: Path, in_checkpoint: bool) -> None:
        """Write a method's own files beside a saved model or adapter; called on the main rank."""

    def _finish_construction(self) -> None:
        """Note the policy's start and add the callbacks, after the parent's constructor."""
        start.check_trains(self.model)
        self._note_start()
        keep_4bit_weights_trainable(self.model)
        self._base_digests = base_digests(self.model, self.is_fsdp_enabled, self._start.converts)
        self._base_digests |= reference_digest(self)
        self.attach_adapter()
        if not self._has_folder:
            return
        if not any(isinstance(callback, RunReport) for callback in self.callback_handler.callbacks):
            self.add_callback(RunReport())
        self.add_callback(run_folder.RunFolder(self))

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
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._schedule.resumed = None
        if checkpoint is not None:
            now = self._identity() | update_settings(self) if self.args.check_resume else None
            state = checkpoints.read(checkpoint, now, self.args.resume_weights_only)["state"]
            self._total_train_tokens = state["num_tokens"]
            self.load_method_state(state.get("method") or {})
            then = state.get("schedule") or {"total": checkpoints.planned_steps(checkpoint), "knots": []}
            self._schedule.resumed = schedule.Schedule.of(then)
            if not self.args.check_resume and self._start.converts and not is_complete(checkpoint):
                raise ConfigError(
                    f"the checkpoint {checkpoint} was not written by posttrain, and init_lora_weights moves the "
                    "base weights, of which it holds no trace. Resume it with the library that wrote it."
                )
            whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            # one that is converted on saving has twice the rank there
            check_adapter_fits(self.model, checkpoint, shapes=whole and not self._start.converts)
            if not self.args.check_resume and not self.args.resume_weights_only:
                checkpoints.warn_of_missing_random_state(checkpoint, self.args.world_size)
            self._start.resume(checkpoint, self.state.global_step > 0)
            synced_reference.load(self, checkpoint)
        if checkpoint is not None and self.args.ignore_data_skip:
            get_logger().warning(
                "ignore_data_skip: going on from %s with the rows that the run began with; it is not the run that was "
                "never interrupted",
                checkpoint,
            )
        self._claim_folder()
        self._live_gradients = None
        try:
            output = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        except KeyError as error:
            # which metrics there are is known at the first evaluation, where upstream looks the best one up
            if "metric_for_best_model" not in str(error):
                raise
            raise ConfigError(str(error.args[0])) from None
        if self._live_gradients and self.step_moved:
            self._live_gradients.after_step(self)
        return output

    def _checkpoint_to_resume(self, wanted):
        args = self.args
        found = checkpoints.find(args.output_dir, wanted, args.check_resume, args.resume_weights_only)
        if str(wanted).lower() not in ("auto", "true"):
            return found
        if found is not None and args.overwrite and str(wanted).lower() == "auto":
            then = checkpoints.settings_of(checkpoints.read(found, None, args.resume_weights_only))
            told = differing(self._identity() | update_settings(self), then)
            if told and args.check_resume:
                get_logger().warning("%s is of another run (%s): overwrite is true, this one starts anew", found, told)
                return None
        over = checkpoints.passed_over(args.output_dir, found)
        if over:
            get_logger().warning(
                "resume_from_checkpoint is %s: %s. Passed over: %s",
                wanted,
                f"going on from {found}" if found else "starting anew",
                over,
            )
        return found

    def _claim_folder(self) -> None:
        if not self._has_folder:
            return
        self._check_folder()
        if self.is_world_process_zero():
            run_folder.claim(Path(self.args.output_dir), self)

    def columns_in_identity(self) -> set[str]:
        """Return the columns of training rows that reach a batch, but for those that a model computed.

        What a model computes differs in rounding on another machine, and follows from the rest of the identity.
        """
        self._set_signature_columns_if_needed()
        return {name for name in self._signature_columns if not name.startswith("ref_")} - self.computed_columns()

    def computed_columns(self) -> set[str]:
        """Return the columns of training rows that a model computed."""
        return set()

    def _check_folder(self) -> None:
        """Refuse the run folder of another run that may have begun there since construction; before the first write."""
        if not self._folder_is_ours:
            run_folder.check_free(self)
            self._folder_is_ours = True

    def _identity(self) -> dict:
        if self._known_identity is None:
            self._known_identity = identity(self)
        return self._known_identity

    @property
    def step_moved(self) -> bool:
        """Return whether the last optimiser step could move the weights."""
        return True

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
            super()._load_optimizer_and_scheduler(checkpoint)
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

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the adapter or model, and push it with `push_to_hub: true`, as TRL's trainers do; all ranks call it.

        No local path is left in the card that PEFT writes. In the run folder, a note says whose model it is.
        """
        folder = Path(output_dir or self.args.output_dir)
        own = folder.resolve() == Path(self.args.output_dir).resolve()
        notes = own and self.is_world_process_zero() and self._has_folder
        if self._has_folder and own:
            self._check_folder()
        elif self._has_folder:
            run_folder.check_not_anothers(folder, self)
        try:
            if notes:
                before = run_folder.begin_note(folder, self)
            # not upstream's own push from here: it would come before our changes to what lies there
            super().save_model(output_dir, _internal_call=True)
            if self.is_world_process_zero():
                self._start.saved(folder)
            if notes:
                run_folder.note_model(folder, self, before)
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

    # stands on Trainer._load_from_checkpoint
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._start.converts:
            self._start.load(resume_from_checkpoint)
        else:
            with same_precision(model if model is not None else self.model):
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

    # stands on Trainer._push_from_checkpoint
    def _push_from_checkpoint(self, checkpoint_folder):
        push_checkpoint(self, checkpoint_folder)

    # stands on DPOTrainer._save_checkpoint, and through it on Trainer's
    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with checkpoints.complete_or_not_there(self, folder):
            super()._save_checkpoint(model, trial)
            synced_reference.save(self, folder)

    # stands on Trainer._finalize_training, which deletes whatever is named as a checkpoint is
    def _finalize_training(self, trial, num_train_samples, start_time):
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit
        checkpoints.keep_best_alone(self, Path(self._get_output_dir(trial)))
        return output

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
        if self._live_gradients is None:
            watched = self.args.check_gradients and is_peft_model(self.model)
            self._live_gradients = LiveGradients(self.model) if watched else False
        elif self._live_gradients and self.step_moved and self._live_gradients.after_step(self):
            self._live_gradients = False
        if self._live_gradients:
            self._live_gradients.before_step(self)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **evaluated):
        """Write `README.md` into the output folder: what was trained, on what, how, and how to load it.

        `evaluated`: the keywords of `posttrain.hub.write_model_card` that name the rows of the evaluation.
        """
        if self.is_world_process_zero():
            write_model_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags, **evaluated)
