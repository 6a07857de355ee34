"""What the DeepSpeed settings of a file may not name: files and folders to write to, and services to send to."""

import json
import re
from collections.abc import Iterator, Mapping

from posttrain.errors import ConfigError
from posttrain.visible import one_line

# Sections that write files, by default in the working folder or at home, start processes or send away
_SECTIONS = ("autotuning", "comet", "csv_monitor", "tensorboard", "wandb")
_OF_A_PATH = re.compile(r"(?:^|_)(?:path|dir|directory|file|folder)s?$")
_MOST_CHARACTERS = 1 << 20


def check_paths(value, place: str) -> None:
    """Raise ConfigError where DeepSpeed settings of a file write elsewhere than the run does, or send away.

    Args:
        value: a mapping, or a text: one as JSON, in base64, or in a JSON file of that path.
        place: the settings file and line, for the error.
    """
    for keys, held in _entries(_settings(value)):
        name = ".".join(map(one_line, keys))
        if keys[-1] in _SECTIONS and _is_on(held):
            raise _refused(place, f"`deepspeed` turns {name} on, which writes or sends beside the run's own files.")
        if isinstance(held, str) and held and (_OF_A_PATH.search(keys[-1]) or re.search(r"[/\\]|^~|^\.\.$", held)):
            raise _refused(place, f"`deepspeed` sets {name} to {one_line(held)}, a path beside the run's own files.")


def _refused(place: str, what: str) -> ConfigError:
    return ConfigError(
        f"{place}: {what} A settings file alone writes in output_dir, as the run does. Leave it out there (the "
        "trackers are `report_to`), or have it in a DeepSpeed file that you name on the command line: --deepspeed FILE."
    )


def _settings(value):
    from posttrain.config.given_values import content_of

    if isinstance(value, str):
        try:
            text = content_of(value, takes_base64=True)
            value = json.loads(text) if len(text) <= _MOST_CHARACTERS else None
        # what it is, is checked where it is used
        except (ValueError, RecursionError):
            return None
    return value


def _is_on(section) -> bool:
    if isinstance(section, Mapping):
        return section.get("enabled", False) not in (False, None, 0, "", "false", "False")
    return bool(section)


def _entries(value) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield each value with the keys that lead to it; those of a list have its keys."""
    waiting = [((), value)]
    while waiting:
        keys, held = waiting.pop()
        if keys:
            yield keys, held
        inside = held.items() if isinstance(held, Mapping) else []
        if isinstance(held, list) and keys:
            waiting += [(keys, part) for part in reversed(held)]
        waiting += [((*keys, str(key)), part) for key, part in reversed(list(inside))]
