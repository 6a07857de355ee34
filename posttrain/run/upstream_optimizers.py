"""transformers' own optimizers: their packages, and what it reads of `optim_args` and Adam's settings, found by asking.

Of those that need the model, which nobody can ask before it is there, what they read is written down here.
"""

import contextlib
import copy
import math
import warnings
from importlib.util import find_spec

import torch
from transformers import Trainer

from posttrain import patterns
from posttrain.checks import near, shorten
from posttrain.errors import ConfigError, EnvironmentIssue, ExcludedSetting
from posttrain.run import optimizer_args
from posttrain.run.checks import upstream_refusals

_ADAMS = ("adam_beta1", "adam_beta2", "adam_epsilon")
# the settings that say what a name in optim_args may mean
_MEANT = {
    "betas": ("adam_beta1", "adam_beta2"), "beta1": ("adam_beta1",), "beta2": ("adam_beta2",),
    "eps": ("adam_epsilon",), "epsilon": ("adam_epsilon",),
    "adam_beta1": ("adam_beta1",), "adam_beta2": ("adam_beta2",), "adam_epsilon": ("adam_epsilon",),
}  # fmt: skip
# names that may be told to a user, each asked for before
_WORDS = """
    momentum dampening nesterov centered lr_decay alpha eps beta1 beta2 beta3 t_alpha t_beta3 block_size
    bf16_stochastic_round alpha_init lamb gamma grokking_signal_decay_rate gradient_clipping weight_lr_power r max_lr
    kahan_sum decouple_lr use_kahan_summation momentum_dtype variance_dtype compensation_buffer_dtype
""".split()
# what each is to be; others are finite numbers
_KINDS = {
    "true or false": {"nesterov", "centered", "bf16_stochastic_round", "use_kahan_summation"},
    "true, or left out, as transformers takes any text for true": {"kahan_sum", "decouple_lr"},
    "a whole number of 1 or more": {"t_alpha", "t_beta3", "rank", "update_proj_gap", "block_size"},
    "a number in [0, 1)": {"beta1", "beta2", "beta3"},
    "a number of 0 or more": {"momentum", "lr_decay", "eps", "alpha"},
    "one of float32, bfloat16, float16": {"momentum_dtype", "variance_dtype", "compensation_buffer_dtype"},
    "a name": {"proj", "proj_type", "scale_type"},
}
_FITS = {
    "true or false": lambda text: text.lower() in ("true", "false"),
    "true, or left out, as transformers takes any text for true": lambda text: text.lower() == "true",
    "a whole number of 1 or more": lambda text: text.isascii() and text.isdecimal() and int(text[:20]) >= 1,
    "a number in [0, 1)": lambda text: 0 <= _number(text) < 1,
    "a number of 0 or more": lambda text: 0 <= _number(text) < math.inf,
    "one of float32, bfloat16, float16": lambda text: text in ("float32", "bfloat16", "float16"),
    "a name": str.isidentifier,
    "a finite number": lambda text: math.isfinite(_number(text)),
}
# Those that ask for more of a model than its parameters, by how their names begin: what they read of optim_args
_LOW_RANK = {
    "galore": ("rank", "update_proj_gap", "scale", "proj_type"),
    "apollo": ("rank", "proj", "scale_type", "update_proj_gap", "scale", "proj_type"),
}
_OF_THE_MODEL = _LOW_RANK | {"lomo": (), "adalomo": ()}
# The module that an optimizer needs, by how its name begins, and what pip installs
_PACKAGES = {
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu": ("torch_npu", "torch_npu"),
    "adamw_anyprecision": ("torchdistx", "git+https://github.com/pytorch/torchdistx"),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), ("torchao", "torchao")),
    **dict.fromkeys(
        ("adamw_bnb", "adamw_8bit", "ademamix", "lion", "paged_", "rmsprop_bnb"), ("bitsandbytes", "bitsandbytes")
    ),
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    **dict.fromkeys(("lomo", "adalomo"), ("lomo_optim", "lomo-optim")),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
}
# a value that is no number, no truth value and no default
_NO_VALUE = "?"
_REFUSALS = (ValueError, TypeError, AttributeError, NotImplementedError)


def check(args, name: str) -> None:
    """Refuse one of transformers' optimizers that a run could not go on with, or settings without effect on it.

    Args:
        args: a trainer's config, whose optim is `name`, one of transformers' own.

    Raises:
        ConfigError: a text that is not name=value, a name that is not read, a value of another kind or out of range;
            layers to work on that are missing or no names.
        ExcludedSetting: a setting that was written, and is not read; a layerwise optimizer beside accumulation.
        EnvironmentIssue: its package is missing.
    """
    given = optimizer_args.split(args.optim_args)
    optimizer_args.refuse_elsewhere(given)
    package = _of(_PACKAGES, name)
    if package and find_spec(package[0]) is None:
        raise EnvironmentIssue(f"optim is {name}, which needs the package {package[0]}: pip install {package[1]}.")
    _check_targets(args, name)
    known = _of(_OF_THE_MODEL, name)
    for one, value in given.items():
        if known is None and not reads(args, one) or known is not None and one not in known:
            raise ConfigError(_unread(args, name, one))
        kind = next((kind for kind, names in _KINDS.items() if one in names), "a finite number")
        if not _FITS[kind](value):
            raise ConfigError(f"optim_args: {one} is {value}; with optim {name} it must be {kind}.")
    for other in _ADAMS:
        own = getattr(args, other)
        if other in args._written and own != type(args).__dataclass_fields__[other].default:
            if not _reads_setting(args, other, args.optim_args):
                raise ExcludedSetting(
                    f"{other} is {own}, which optim {name} does not read. Leave {other} out.", {other: ("optim",)}
                )
    with upstream_refusals(f"optim {name} cannot be built with optim_args {args.optim_args!r}"):
        if known is not None:
            with contextlib.suppress(ValueError):
                Trainer.get_optimizer_cls_and_kwargs(args)
            return
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        _check_numbers(name, given, settings)
        kind([torch.nn.Parameter(torch.zeros(1))], **settings)


def _check_targets(args, name: str) -> None:
    """Refuse `optim_target_modules` that are not read, or that name no layers where they are needed."""
    targets = args.optim_target_modules
    if _of(_LOW_RANK, name) is None:
        if targets is not None:
            raise ExcludedSetting(
                f"optim_target_modules is {shorten(targets)}, which optim {name} does not read: those of galore and "
                "apollo do. Leave optim_target_modules out.",
                {"optim_target_modules": ("optim",)},
            )
        return
    names = [targets] if isinstance(targets, str) else targets
    if not (isinstance(names, list) and names and all(isinstance(one, str) and one for one in names)):
        raise ConfigError(
            f"optim_target_modules is {shorten(targets)}; optim {name} needs the linear layers that it works on: "
            "all-linear, a pattern, or a list of names such as [attn, mlp]."
        )
    for one in names:
        patterns.check(one, "optim_target_modules")
    if name.endswith("_layerwise") and args.gradient_accumulation_steps != 1:
        raise ExcludedSetting(
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps}, and optim {name} moves each layer "
            "within the backward pass of one micro-batch. Set `gradient_accumulation_steps: 1`, or use "
            f"{name.removesuffix('_layerwise')}.",
            {"gradient_accumulation_steps": ("optim",)},
        )


def _check_numbers(name: str, given: dict[str, str], settings: dict) -> None:
    """Refuse numbers that transformers hands on as the texts that they were, and SGD's mix of settings."""
    for one, value in given.items():
        if settings.get(one) == value and "a name" != next((k for k, names in _KINDS.items() if one in names), ""):
            raise ConfigError(
                f"optim_args names {one}, which transformers hands to optim {name} as a text, where a number is "
                "needed. Leave it out."
            )
    if settings.get("nesterov") and (not settings.get("momentum") or settings.get("dampening")):
        raise ConfigError(
            f"optim_args: nesterov is true with momentum {settings.get('momentum', 0):g} and dampening "
            f"{settings.get('dampening', 0):g}; it needs a momentum above 0 and a dampening of 0."
        )


def _of(table: dict, name: str):
    """Return the entry of the longest beginning of a name; None where there is none."""
    return table.get(max((start for start in table if name.startswith(start)), key=len, default=None))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def reads(args, name: str) -> bool:
    """Tell whether transformers reads this name of `optim_args` for the config's optimizer."""
    if not name.isidentifier():
        return False
    try:
        return _asked(args, f"{name}={_NO_VALUE}", refusals=()) != _asked(args, None)
    except _REFUSALS:
        # it was read, and is no value
        return True


def _reads_setting(args, name: str, text: str | None) -> bool:
    if (family := _of(_OF_THE_MODEL, str(getattr(args.optim, "value", args.optim)))) is not None:
        # it goes to APOLLO alone
        return family == _LOW_RANK["apollo"]
    return _asked(args, text) != _asked(args, text, **{name: getattr(args, name) / 2 + 0.1})


def _asked(args, text: str | None, refusals: tuple = _REFUSALS, **settings):
    """Return the class and its arguments as transformers has them for these settings; None where it refuses."""
    other = copy.copy(args)
    for name, value in (settings | {"optim_args": text}).items():
        setattr(other, name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Trainer.get_optimizer_cls_and_kwargs(other)
    except (ImportError, *refusals):
        return None


def _unread(args, name: str, one: str) -> str:
    said = f"optim_args names {one!r}, which transformers does not read for optim {name}."
    meant = [other for other in _MEANT.get(one, ()) if _reads_setting(args, other, None)]
    if meant:
        return f"{said} Set {' and '.join(meant)} instead."
    known = _of(_OF_THE_MODEL, name)
    if known is None:
        known = [word for word in _WORDS if reads(args, word)]
    close = near(one, known)
    hint = f" Did you mean {close}?" if close else ""
    return f"{said}{hint} It reads {', '.join(known) or 'nothing'}."
