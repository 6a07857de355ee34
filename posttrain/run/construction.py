"""How a trainer is built: settings checked first, the parent's constructor in the middle, what may take long last."""

import contextlib
import contextvars
import copy
import inspect
from collections.abc import Callable

from peft import PeftModel
from trl.trainer.utils import get_config_model_id

from posttrain.compat import keep_4bit_weights_trainable
from posttrain.errors import ConfigError
from posttrain.hub import preflight
from posttrain.mechanisms.base_digests import base_digests
from posttrain.mechanisms.spread_weights import give_whole_head, keep_fp32_outputs
from posttrain.models import embedded_name
from posttrain.run import (
    adapter_schemes,
    checks,
    devices,
    optimizers,
    preemption,
    refactoring,
    run_folder,
    schedule,
    settings,
    sharing,
    start,
    update_config,
    upstream_configs,
)
from posttrain.run.agreement import Agreement
from posttrain.run.engines import add_up_in_fp32
from posttrain.run.identity import reference_digest
from posttrain.run.prepared import Prepared
from posttrain.run.report import RunReport
from posttrain.run.sharpness import Sharpness
from posttrain.run.watches import FiniteLoss

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


class ConstructionMixin:
    """Builds a trainer, in the one order that every family keeps, which stands in `_build`.

    A family fills in its steps: `_begin` before the parent's constructor, `_place` behind it, `_complete` at the end.
    """

    _config_class: type
    # why a method is never private, where `privacy` is given to it
    _not_private = "it has no private steps, which DPSFTTrainer and RobustDPOTrainer have"

    def _build(self, model, args, given: dict, prepare: Callable, construct: Callable) -> None:
        """Construct the trainer, in the one order that every family keeps.

        Args:
            given: what the parent's constructor takes beside model, settings and data sets, by name; `prepare` may add.
            prepare: called with the model, the settings and the model's config; returns a `Prepared`.
            construct: the parent's constructor.
        """
        model, args, config = self._check_settings(model, args, given.get("peft_config"))
        if args.privacy is not None:
            # the plan of its steps changes them, and the caller's stay as they were given
            args = copy.copy(args)
        ready = prepare(model, args, config)
        self._begin_run(self._preflight(model, args), args)
        self._follow_plan(args, ready.plan)
        self._begin(ready)
        with checks.upstream_refusals(), devices.named(args, model):
            construct(model, args=args, train_dataset=ready.train_dataset, eval_dataset=ready.eval_dataset, **given)
        if self.args.gradient_checkpointing_kwargs and hasattr(self.args, "activation_checkpointing_kwargs"):
            # what TRL's constructor settles by the former name: reentrant for an adapter under ZeRO-3
            self.args.activation_checkpointing_kwargs = self.args.gradient_checkpointing_kwargs
        checks.check_parallelism(self.accelerator)
        optimizers.give_to(self)
        self._calibrate_adapter()
        # rows that are dropped once all are tokenised are gone by now, and nobody has asked for the run's identity
        self._plan_anew()
        self._place(ready)
        # the run's folder may be another's, which is asked before anything long
        self._finish_construction()
        self._complete(ready)

    # stands on Trainer.create_accelerator_and_postprocess, before any model is placed
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        devices.name_device(self.args)
        if self.is_fsdp_enabled:
            keep_fp32_outputs(self.accelerator.state.fsdp_plugin)
        if self.is_deepspeed_enabled:
            add_up_in_fp32(self.accelerator.state.deepspeed_plugin)

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
        live = self._live_reference(args)
        model, config = settings.check(model, args, peft_config, type(self).__name__, live, self._has_folder)
        return model, args, config

    def _live_reference(self, args) -> bool:
        """Return whether an adapter's reference is the policy itself, with its adapter off or replaced."""
        return False

    def _note_start(self) -> None:
        # TRL's constructor may forward the reference before it returns, so whoever comes first
        if self._start is None:
            self._calibrate_adapter()
            self._start = start.Start(self, self._peft_config, self._live_reference(self.args))
            self._scheme.know_copies()

    def _calibrate_adapter(self) -> None:
        # before any forward with the adapter on
        if not self._is_calibrated:
            self._is_calibrated, self._scheme = True, adapter_schemes.of(self)

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
        if kwargs.get("privacy") is not None:
            raise ConfigError(f"privacy is given to {type(self).__name__}; {self._not_private}. Leave it out.")
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
        self._is_calibrated, self._scheme = False, adapter_schemes.InRun()
        tau = args.gradient_agreement
        self._agreement = None if tau is None else Agreement(self, tau)
        self._sharpness = Sharpness(self) if args.perturbs_weights else None

    def _finish_construction(self) -> None:
        """Note the policy's start and add the callbacks, after the parent's constructor."""
        start.check_trains(self.model)
        sharing.use_kernels(self.args, self.accelerator.device)
        update_config.check_precision(self)
        self._note_start()
        keep_4bit_weights_trainable(self.model)
        if self.is_fsdp_enabled:
            give_whole_head(self.model)
        self._base_digests = base_digests(self.model, self.is_fsdp_enabled, self._start.converts)
        self._base_digests |= reference_digest(self)
        if type(self._scheme) is not adapter_schemes.InRun:
            self.add_callback(self._scheme)
        if self.args.refactor_every:
            self.add_callback(refactoring.callback(self))
        self.attach_adapter()
        self._stop_early = preemption.StopEarly(self)
        if not self._has_folder:
            return
        self.add_callback(self._stop_early)
        if not any(isinstance(callback, RunReport) for callback in self.callback_handler.callbacks):
            self.add_callback(RunReport())
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RunReport):
                callback.found = self.found_by_method
        self.add_callback(run_folder.RunFolder(self))
