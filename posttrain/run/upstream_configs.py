"""Settings of TRL's own config classes, read as those of a trainer here."""

from dataclasses import MISSING, fields

from transformers import TrainingArguments
from trl import SFTConfig

from posttrain.log import get_logger
from posttrain.run.config import CommonConfig


def as_own(args, config_class: type):
    """Convert `args` to a `config_class`, keeping every value, those that TRL resolved included; logs that it did.

    Args:
        args: a `config_class`, or the TRL config that it extends, or a subclass of that; for A-LoL also a plain
            `transformers.TrainingArguments`, which `trl.SFTTrainer` takes.
        config_class: the trainer's config. Its own settings are at their defaults.

    Raises:
        TypeError: settings of another trainer.
        ConfigError: what `config_class` refuses.
    """
    if isinstance(args, config_class):
        return args
    upstream = next(kind for kind in config_class.__mro__ if kind.__module__.split(".")[0] == "trl")
    given = type(args).__name__
    if upstream is SFTConfig and type(args) is TrainingArguments:
        # as SFTTrainer does; the text of the settings hides the token
        args = SFTConfig(**args.to_dict() | {"hub_token": args.hub_token})
    if not isinstance(args, upstream) or isinstance(args, CommonConfig):
        raise TypeError(
            f"args is a {given}; it must be a posttrain.{config_class.__name__}, or the trl.{upstream.__name__} that "
            "it extends."
        )
    own = config_class.__new__(config_class)
    vars(own).update({entry.name: _default(entry) for entry in fields(config_class)})
    vars(own).update(vars(args))
    own._resolved_upstream = True
    own._written = {entry.name for entry in fields(upstream)}
    own.__post_init__()
    method = ", ".join(f"{name}: {getattr(own, name)}" for name in own.says if getattr(own, name) is not None)
    get_logger().info("args: the %s is read as a %s, every value kept, with %s", given, config_class.__name__, method)
    return own


def _default(entry):
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def check_args(args, config_class: type, output_dir: str | None = None):
    """Return `args` as a `config_class`, or the class's defaults. `output_dir`: where the defaults are to write.

    Raises TypeError for another trainer's settings.
    """
    return config_class(output_dir) if args is None else as_own(args, config_class)
