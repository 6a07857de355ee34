"""What transformers reads of `optim_args` and of Adam's settings for its own optimizers, found by asking it."""

import copy
import math
import warnings

from transformers import Trainer

from posttrain.checks import near
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.run import optimizer_args

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
# a value that is no number, no truth value and no default
_NO_VALUE = "?"
_REFUSALS = (ValueError, TypeError, AttributeError, NotImplementedError)


def check(args, name: str) -> None:
    """Refuse what transformers would take for one of its optimizers without effect.

    Args:
        args: a trainer's config, whose optim is `name`, one of transformers' own.

    Raises:
        ConfigError: a text that is not name=value, a name that is not read, a value that is no plain one.
        ExcludedSetting: one of Adam's settings that was written, and is not read.
    """
    given = optimizer_args.split(args.optim_args)
    optimizer_args.refuse_elsewhere(given)
    if _asked(args, None) is None:
        # a package is missing, which the check of the optimizer says, or it needs the model
        return
    for one, value in given.items():
        if not reads(args, one):
            raise ConfigError(_unread(args, name, one))
        if not _is_plain(value):
            raise ConfigError(f"optim_args: {one} is {value}; with optim {name} it is a single finite value.")
    for other in _ADAMS:
        own = getattr(args, other)
        if other in args._written and own != type(args).__dataclass_fields__[other].default:
            if not _reads_setting(args, other, args.optim_args):
                raise ExcludedSetting(
                    f"{other} is {own}, which optim {name} does not read. Leave {other} out.", {other: ("optim",)}
                )


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
    known = [word for word in _WORDS if reads(args, word)]
    close = near(one, known)
    hint = f" Did you mean {close}?" if close else ""
    return f"{said}{hint} It reads {', '.join(known) or 'nothing'}."


def _is_plain(value: str) -> bool:
    if any(mark in value for mark in "()[]="):
        return False
    try:
        return math.isfinite(float(value))
    except ValueError:
        return True
