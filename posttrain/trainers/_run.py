"""What every trainer's run has: complete checkpoints and exact resumption, watches over loss and gradients, the hub."""

import math
import time

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError

from posttrain.compat import keep_4bit_weights_trainable
from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.hub import clean_readme, push_checkpoint, push_run, write_model_card
from posttrain.models import resolve_model
from posttrain.reporting import RunReport
from posttrain.trainers import _checkpoints, _checks, _evaluation
from posttrain.trainers._guards import FiniteLoss, LiveGradients, stop
from posttrain.trainers._sharing import check_setting


class RunMixin:
    """The part of each mixin that does not depend on its family. Stands on `transformers.Trainer`."""

    _config_class: type
    # of a metric that an evaluation has measured nowhere
    no_value = math.nan

    def _check_start(self, model, args, peft_config):
        """The model (an id resolved to what can be loaded), the settings and the model's config, all checked."""
        args = _checks.check_args(args, self._config_class, type(self).__name__)
        _checks.check_output_dir(args.output_dir)
        if peft_config is not None:
            _checks.check_lora(peft_config)
        if isinstance(model, str):
            model = resolve_model(model)
        config = model.config if isinstance(model, torch.nn.Module) else _checks.load_config(model, args)
        check_setting(args, config, peft_config)
        return model, args, config

    def _begin_run(self, hub_destination) -> None:
        """Before the parent's constructor."""
        self.hub_destination = hub_destination
        self._known_identity = None
        self._finite_loss, self._live_gradients = FiniteLoss(), None

    def _finish_construction(self) -> None:
        """After the parent's constructor."""
        keep_4bit_weights_trainable(self.model)
        if not any(isinstance(callback, RunReport) for callback in self.callback_handler.callbacks):
            self.add_callback(RunReport())
        self.add_callback(_checkpoints.RunFolder(self))

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train as `transformers.Trainer.train` does, resuming only from complete checkpoints.

        Args:
            resume_from_checkpoint: a path; True for the newest complete checkpoint in `output_dir`; "auto" for that one
                if there is any.

        Raises:
            ConfigError: no complete checkpoint where one is asked for, or one of another method, data or batch split;
                a metric_for_best_model that the evaluation has not.
            DivergedError: the loss or the gradient became NaN or infinite, or adapter tensors get no gradient.
        """
        checkpoint = _checkpoints.find(self.args.output_dir, resume_from_checkpoint)
        if checkpoint is not None:
            now = self._identity() | _checkpoints.update_settings(self) if self.args.check_resume else None
            content = _checkpoints.read(checkpoint, now)
            self._total_train_tokens = content["state"]["num_tokens"]
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

    def _identity(self) -> dict:
        if self._known_identity is None:
            self._known_identity = _checkpoints.identity(self)
        return self._known_identity

    @property
    def step_moved(self) -> bool:
        """Whether the last optimiser step could move the weights."""
        return True

    def identity_settings(self) -> dict:
        """Settings of the method that a resumed run must share with the one it goes on from."""
        return {}

    # stands on Trainer.get_batch_samples, the first call of an optimiser step; each mixin's own comes after it
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:
            # resumed from its last step: upstream would take one more
            self.control.should_training_stop = True
            return [], None
        self._watch_gradients()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the adapter or model; all ranks call it. No local path is left in the card that PEFT writes."""
        # not upstream's own push from here: it would come before the card, and push_to_hub is called after it anyway
        try:
            super().save_model(output_dir, _internal_call=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _checkpoints.is_write_error(error):
                raise
            folder = output_dir or self.args.output_dir
            raise EnvironmentIssue(f"the model could not be saved to {folder}: {error}") from error
        if self.is_world_process_zero():
            clean_readme(output_dir or self.args.output_dir, self.args.base_model_id)

    # stands on Trainer.push_to_hub: saves first, on all ranks, and never fails the run
    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        """Save, write the card and push to the hub; a push that fails is a warning with the command that retries."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return push_run(self, commit_message, blocking=blocking, token=token, revision=revision)

    # stands on Trainer.init_hf_repo, which would ask the hub again, once and without another try
    def init_hf_repo(self, token=None, private=None):
        self.hub_model_id = self.hub_destination.repo_id
        self.push_in_progress = None

    # stands on Trainer._push_from_checkpoint
    def _push_from_checkpoint(self, checkpoint_folder):
        push_checkpoint(self, checkpoint_folder)

    # stands on DPOTrainer._save_checkpoint, and through it on Trainer's
    def _save_checkpoint(self, model, trial):
        with _checkpoints.complete_or_not_there(self):
            super()._save_checkpoint(model, trial)

    # stands on Trainer._clip_grad_norm, the last call before the optimiser's step
    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        # in fp16 the gradient scaler skips such steps by itself
        if norm is None or self.skips_step(model, norm):
            return norm
        if not self.args.fp16 and not math.isfinite(norm):
            stop(self, "the gradient")
        return norm

    def _reduce_means(self, logs: dict[str, float]) -> None:
        """The means kept in `_means` into the lists that TRL averages on logging; all ranks call it."""
        mode = "train" if self.model.training else "eval"
        sums = self._means[mode].reduce(self.accelerator)
        if "num_tokens" in sums:
            tokens = int(sums.pop("num_tokens")[0])
            self._total_train_tokens += tokens
            if self._clock is not None:
                logs["tokens/per_second"] = tokens / (time.monotonic() - self._clock)
                self._clock = None
        metrics = {name: total / count if count else 0.0 for name, (total, count) in sums.items()}
        if metrics:
            metrics["num_tokens"] = self._total_train_tokens
            self.finish_metrics(metrics, mode)
        for name, value in metrics.items():
            self._metrics[mode][name] = [value]

    # stands on Trainer.evaluation_loop, which alone is told the name of the set, by evaluate and predict alike
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        _evaluation.forget(self)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self.finish_evaluation(dataloader, description)
        output.metrics.update(_evaluation.take_metrics(self, metric_key_prefix))
        return output

    def finish_evaluation(self, dataloader, description: str) -> None:
        """Put what was measured beside TRL's metrics of an evaluation; all ranks call it."""

    def finish_metrics(self, metrics: dict[str, float], mode: str) -> None:
        """Derive metrics from the reduced ones, in place; `mode`: train or eval."""

    def skips_step(self, model, norm) -> bool:
        """Whether a step is left out for its gradient's norm before clipping; the gradients are gone then."""
        return False

    def _watch_gradients(self) -> None:
        if self._live_gradients is None:
            watched = self.args.check_gradients and is_peft_model(self.model)
            self._live_gradients = LiveGradients(self.model) if watched else False
        elif self._live_gradients and self.step_moved and self._live_gradients.after_step(self):
            self._live_gradients = False
        if self._live_gradients:
            self._live_gradients.before_step(self)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Write `README.md` into the output folder: what was trained, on what, how, and how to load it."""
        if self.is_world_process_zero():
            write_model_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags)
