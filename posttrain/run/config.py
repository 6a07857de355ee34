"""Settings every trainer's config shares."""

import contextlib
import copy
import math
import os
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch

from posttrain.checks import check_choice
from posttrain.config.given_values import check_given, written
from posttrain.config.setting import may_be_infinite, setting
from posttrain.data.rendering.ends import CHOICES
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.log import get_logger
from posttrain.private import without_secrets
from posttrain.run import checkpoints, identity, optimizers, preemption, private_settings, refactoring, schedule
from posttrain.run.checks import check_reporters, upstream_refusals
from posttrain.run.engines import is_supposed, under_fsdp
from posttrain.run.engines import under_deepspeed as under_deepspeed
from posttrain.run.kernel_config import KernelConfig
from posttrain.run.update_config import UpdateConfig


@dataclass
class CommonConfig(KernelConfig, UpdateConfig):
    """Adds to TRL's configs what all trainers here share: defaults that fit the machine, watches over a run.

    TRL's configs ask for bf16 and gradient checkpointing, and raise where there is no accelerator. Here a field left
    at None is chosen: with an accelerator as TRL has it, without one plain fp32 on the CPU.
    """

    use_cpu: bool | None = setting(
        None, "Run on the CPU. Default: only where there is no accelerator.", identity=False, card=False
    )
    gradient_checkpointing: bool | None = setting(
        None,
        "Recompute activations in the backward pass. Default: true with an accelerator.",
        identity=False,
        card=False,
    )

    check_gradients: bool = setting(
        True, "Stop where an adapter tensor gets no gradient in the first two steps.", identity=False, card=False
    )
    end_of_turn: str = setting(
        "warn",
        "Where answers, as they are trained, do not end with an end-of-turn token: warn, or require that "
        "half of them do.",
        identity=False,
        card=False,
    )
    base_model_id: str | None = setting(
        None,
        "Hub id of the base model, for card and push, where it is loaded from a local folder.",
        identity=False,
        card=False,
    )
    dry_run: bool = setting(
        False,
        "Recipes: show batch, steps, sizes and one rendered example, and end before anything loads.",
        identity=False,
        card=False,
    )
    check_resume: bool = setting(
        True,
        "Refuse a checkpoint, or an output_dir, of a run with another method, data or batch split.",
        identity=False,
        card=False,
    )
    resume_weights_only: bool = setting(
        False,
        "Resume with the weights and the step of a checkpoint and a new optimizer, as save_only_model asks.",
        identity=False,
        card=False,
    )
    overwrite: bool = setting(
        False, "Replace what earlier runs left in output_dir; files that no run wrote stay.", identity=False, card=False
    )

    allow_code: list[str] | None = setting(
        None,
        "Modules whose code the settings may name, as rewards, advantages or optimizers; on the command line alone. A "
        "module beside the recipe needs no such word.",
        identity=False,
        card=False,
    )
    save_on_signal: str = setting(
        "auto",
        "At SIGTERM or SIGUSR1: auto finishes the step, saves a checkpoint and ends with exit code 75; never ends at "
        "once.",
        identity=False,
        card=False,
    )
    max_minutes: float | None = setting(
        None,
        "End as at a signal before so many minutes are over, which count from the start of the recipe. Default: no "
        "limit.",
        identity=False,
        card=False,
    )

    refactor_every: int | None = setting(
        0,
        "Steps between two refactorisations of a LoRA, which make A orthonormal and leave the model as it is. 0: none.",
        identity=True,
        card=True,
    )
    refactor_second_moment: str = setting(
        "estimate",
        "What refactorisations do about Adam's second moments: estimate them, or refuse such an optimizer.",
        identity=True,
        card=True,
    )

    # by setting: others that it stands in the place of, so that a file's give way to it on the command line
    replaces: ClassVar[dict[str, tuple[str, ...]]] = {}
    # names that settings had before: theirs to ours
    renamed: ClassVar[dict[str, str]] = {}
    # upstream's settings that a card tells at their default as well
    always_in_card: ClassVar[tuple[str, ...]] = ()
    # whether an adapter's weight noise is gaussian where its config leaves that to the trainer
    weights_have_noise: ClassVar[bool] = False
    # what null of a setting means, for the card
    nulls: ClassVar[dict[str, str]] = {"max_length": "no row is cut"}
    # what a trainer says of the settings that it read from TRL's config
    says: ClassVar[tuple[str, ...]] = ()
    # a `PrivacyConfig` in a private run, whose rows are drawn
    privacy: ClassVar = None
    # what a private run of the method refuses beside what all do, as `posttrain.run.private_settings.check` takes it
    not_apart: ClassVar[tuple] = ()

    @property
    def known_later(self) -> tuple[str, ...]:
        """Return the settings whose values follow from the rows, and so are not known before those are."""
        follows = self.privacy is not None and "gradient_accumulation_steps" not in self._written
        return ("gradient_accumulation_steps",) if follows else ()

    def __new__(cls, *args, **kwargs):
        for name in cls.renamed.keys() & kwargs:
            raise ConfigError(f"{name} is called {cls.renamed[name]}; write `{cls.renamed[name]}: {kwargs[name]}`.")
        self = super().__new__(cls)
        # names of the settings that were given, and are not a class's own defaults
        self._written = written(cls, args, kwargs)
        self._resolved_upstream = False
        return self

    def _read_family(self):
        """Read what the family's mixin reads of every method's settings, before `_read`. Raises ConfigError."""

    def _read(self):
        """Read the method's own settings, before TRL's config reads the others: fill in what follows, refuse the rest.

        Raises ConfigError.
        """

    def _unused(self) -> dict[str, tuple[tuple, str]]:
        """Return the inherited settings that the trainer does not use: the values that ask for nothing, and advice."""
        return {}

    def _check_resolved(self):
        """Check settings that TRL's config fills in. Raises ConfigError."""

    def __post_init__(self):
        check_given(self)
        if self.hub_token == "<HUB_TOKEN>":
            # what to_dict gives in the token's place
            self.hub_token = None
        with upstream_refusals("these settings are refused"):
            self._read_update()
            self._read_kernels()
            self._read_family()
            self._read()
            if self.privacy is not None:
                private_settings.check(self)
        for name, (neutral, instead) in self._unused().items():
            value = getattr(self, name)
            if value not in neutral:
                raise ConfigError(f"{name} is {value}, which this trainer does not use; {instead}. Leave {name} out.")
        if self.neftune_noise_alpha is not None:
            raise ConfigError(
                f"neftune_noise_alpha is {self.neftune_noise_alpha}; its noise would fall on reference and scoring "
                "passes as well. Leave it out."
            )
        check_choice("end_of_turn", self.end_of_turn, CHOICES)
        self._check_ranges()
        check_reporters(self.report_to)
        preemption.check(self)
        refactoring.check_settings(self)
        if self.fp16 and self.bf16:
            raise ExcludedSetting(
                "fp16 and bf16 are both true; keep one of them.", {"fp16": ("bf16",), "bf16": ("fp16",)}
            )
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise ExcludedSetting(
                "load_best_model_at_end is true and eval_strategy is no, so no checkpoint would be the best one. Set "
                "`eval_strategy: steps` or `epoch`, or leave load_best_model_at_end out.",
                {"load_best_model_at_end": ("eval_strategy",)},
            )
        chosen = []
        if not torch.accelerator.is_available():
            if under_fsdp(self) and not is_supposed():
                by = f"fsdp is {self.fsdp!r}" if self.fsdp else "ACCELERATE_USE_FSDP is true"
                raise ConfigError(
                    f"{by}: FSDP was asked for on a machine without an accelerator, where it would train as plain "
                    "DDP. Use configs/accelerate/cpu_zero3.yaml to shard on CPUs."
                )
            if self.fp16:
                raise ConfigError(
                    "fp16 is true on a machine without an accelerator. Leave it out, or set `bf16: true`."
                )
            choices = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
            if self._resolved_upstream:
                choices = {}
            elif under_deepspeed(self):
                # use_cpu would have accelerate look past DeepSpeed; without gloo it takes one process for the world
                choices |= {"use_cpu": False, "ddp_backend": "gloo"}
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            for name, value in choices.items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
                    chosen.append(f"{name}: {str(value).lower()}")
            self.dataloader_pin_memory = False
        self.use_cpu = bool(self.use_cpu)
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = True
        if not self._resolved_upstream:
            with warnings.catch_warnings():
                # transformers is renaming the field that TRL still reads
                warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
                with upstream_refusals("these settings are refused"), self._upstreams_optim():
                    super().__post_init__()
        self._check_update()
        schedule.check(self)
        if self.resume_weights_only and under_deepspeed(self):
            raise ConfigError(
                "resume_weights_only is true under DeepSpeed, which loads weights and optimizer as one. Start a new "
                "run from the checkpoint's weights."
            )
        checkpoints.find(self.output_dir, self.resume_from_checkpoint, self.check_resume, self.resume_weights_only)
        self._check_resolved()
        if chosen:
            get_logger().info("no accelerator here, so %s", ", ".join(chosen))

    @contextlib.contextmanager
    def _upstreams_optim(self):
        # transformers takes its own names alone
        optim = self.optim
        if optimizers.is_upstream(optim):
            yield
            return
        self.optim = self.default_optim
        try:
            yield
        finally:
            self.optim = optim

    def inherited_in_card(self) -> dict[str, object]:
        """Return upstream's settings that a card tells: those of the update that are not at their default."""
        return identity.changed_upstream(self, self.always_in_card)

    def __getstate__(self):
        # training_args.bin is a pickle, and goes wherever the run folder goes
        held = without_secrets(self.__dict__)
        return {name: held.get(name) for name in self.__dict__}

    # stands on TrainingArguments.to_dict, from which loggers and TensorBoard take the settings
    def to_dict(self):
        """Return the settings as plain values, without secrets."""
        held = super().to_dict()
        # upstream hides the tokens of a vocabulary as well
        held |= {name: getattr(self, name) for name in ("eos_token", "pad_token") if name in held}
        return {name: value if name == "hub_token" else without_secrets(value) for name, value in held.items()}

    def __repr__(self):
        return str(self)

    def __str__(self):
        shown = ",\n".join(f"{name}={value!r}" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{shown},\n)"

    # copies stay in the process, so they keep the token
    def __copy__(self):
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def check_model(self, model, config, peft_config=None, eval_dataset=None) -> None:
        """Refuse settings that do not fit a model, before its weights load.

        Args:
            model: its name, or the model itself. config: the model's.
            peft_config: of a new adapter, or None. eval_dataset: as given to the trainer.
        """

    def _has_no_effect(self, name: str, neutral, because: tuple[str, ...], message: str) -> None:
        """Refuse a setting that others leave without effect; where it is a preset's own default, take `neutral`."""
        if name in self._written:
            raise ExcludedSetting(message, {name: because})
        setattr(self, name, neutral)

    def _check_ranges(self) -> None:
        """Refuse values that upstream would only trip over once the model is loaded."""
        if self.output_dir == "":
            raise ConfigError("output_dir is empty; give the folder that the run is to be saved in.")
        try:
            Path(self.output_dir or "").exists()
        except OSError as error:
            raise ConfigError(f"output_dir cannot be a folder ({error.strerror}): {self.output_dir}") from None
        for name, lowest in (
            ("per_device_train_batch_size", 1),
            ("per_device_eval_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("max_length", 2),
            ("learning_rate", 0.0),
            ("weight_decay", 0.0),
            ("max_grad_norm", 0.0),
            ("adam_epsilon", 0.0),
            ("dataloader_num_workers", 0),
            ("seed", 0),
        ):
            value = getattr(self, name, None)
            if value is None and name == "max_length":
                continue
            kind = (int, float) if isinstance(lowest, float) else int
            if isinstance(value, bool) or not isinstance(value, kind) or not lowest <= value < math.inf:
                what = "a number" if isinstance(lowest, float) else "a whole number"
                raise ConfigError(f"{name} is {value!r}; it must be {what} of {lowest:g} or more.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in [0, 1).")
        if self.seed >= 2**32:
            raise ConfigError(f"seed is {self.seed}; it must be below 2**32.")
        if self.max_steps != -1 and not self.max_steps > 0:
            raise ConfigError(f"max_steps is {self.max_steps}; give a number above 0, or -1 to go by num_train_epochs.")
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise ConfigError(f"num_train_epochs is {self.num_train_epochs}; it must be above 0.")
        infinite = may_be_infinite(type(self))
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not isinstance(value, float) or math.isfinite(value):
                continue
            if math.isnan(value) or entry.name not in infinite:
                raise ConfigError(f"{entry.name} is {value}; it must be a finite number.")
