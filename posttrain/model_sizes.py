"""Sizes in a model's config that no model has: to build what they describe would run for ever or fill the memory."""

import re
from collections.abc import Mapping

from posttrain.errors import ConfigError, PosttrainError

# Parts that a model has one after the other or beside each other, and widths.
MOST_PARTS, WIDEST = 20_000, 100_000_000
_PARTS = re.compile(r"(^|_)(layers?|blocks?|heads?|experts?|depths?)(_|$)")
_WIDTHS = re.compile(
    r"(^|_)(size|dims?)(_|$)|(^|_)(embd|embed|inner|width|channels|features|rank|units|labels|model|ff)$"
)


def check_sizes(config: Mapping, owner: str) -> None:
    """Raise ConfigError for a number of parts or a width beyond any model's, at any depth.

    `config`: the content of a config.json, or settings that replace parts of it. `owner`: what messages begin with.
    """
    stack = [config]
    while stack:
        held = stack.pop()
        stack += [value for value in held.values() if isinstance(value, Mapping)]
        for name, value in held.items():
            numbers = value if isinstance(value, list) else [value]
            largest = max((one for one in numbers if isinstance(one, int) and not isinstance(one, bool)), default=0)
            most = WIDEST if _WIDTHS.search(str(name)) else MOST_PARTS if _PARTS.search(str(name)) else None
            if most is not None and largest > most:
                shown = f"{largest:,}" if largest < 10**15 else "a number of more than 15 digits"
                raise ConfigError(f"{owner}: {name} is {shown}, and no model has more than {most:,}. Mend it.")


def check_folder(model: str, revision: str | None = None) -> None:
    """Check the config.json of a model, before it is read as a config: a hub id or folder.

    Raises ConfigError as `check_sizes`, and OSError and ValueError as `AutoConfig.from_pretrained` where there is none.
    """
    from transformers import PreTrainedConfig

    config, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
    check_sizes(config, f"model {model!r}")


def check_if_there(model: str, revision: str | None = None) -> None:
    """Check as `check_folder` does where there is a config.json that can be read; of others nothing is said here."""
    try:
        check_folder(model, revision)
    except PosttrainError:
        raise
    except (OSError, ValueError):
        return
