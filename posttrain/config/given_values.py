"""Checks that the values that a config was given have the types of their fields."""

import base64
import functools
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from numbers import Integral, Real
from pathlib import Path

from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import FSDPOption

from posttrain.checks import check_choice, check_holdable, plain
from posttrain.config.field_types import FieldType
from posttrain.config.setting import defaults_of, may_be_infinite
from posttrain.errors import ConfigError
from posttrain.private import is_secret_name, without_secrets

# what upstream takes beside what the annotations say
_TAKEN_BESIDE = {
    "accelerator_config": (AcceleratorConfig,),
    "debug": (type(None),),
    "fsdp": (bool, list, tuple),
    "loss_type": (str,),
    "resume_from_checkpoint": (bool,),
    "scale_rewards": (bool,),
}
_ITEMS = {str: "texts", int: "whole numbers", float: "numbers"}
_PATHS = ("accelerator_config", "deepspeed", "resume_from_checkpoint")
_PATH_ENDINGS = ("_dir", "_path", "_file", "_folder", "_cache")
# settings whose text may be the path of a JSON file
_JSON_FILES = ("accelerator_config", "deepspeed", "fsdp_config")


def written(config_class: type, args: tuple, kwargs: Mapping) -> set[str]:
    """Return the names of the settings that a config was given by position and by name.

    Where it was given all of them, as `dataclasses.replace` gives those of another one, those at their default were
    not asked for.
    """
    entries = fields(config_class)
    given = dict(zip((entry.name for entry in entries), args, strict=False)) | kwargs
    if not given.keys() >= {entry.name for entry in entries if entry.init}:
        return set(given)
    own = defaults_of(config_class)
    return {name for name, value in given.items() if not _is_default(value, own.get(name))}


def _is_default(value, default) -> bool:
    # comparing values of other kinds may do anything
    comparable = isinstance(default, bool | int | float | str) and type(value) is type(default)
    return value is default or (comparable and value == default)


def check_given(args) -> None:
    """Refuse values of `args._written` that their fields cannot hold.

    The text inf becomes the number, and numpy's values become Python's own, so that they can be saved.

    Upstream's own liberties are kept: enums by value, paths for texts, a mapping as JSON or as a JSON file, 0 and 1 for
    false and true.

    Raises ConfigError.
    """
    hints, infinite = _hints(type(args)), may_be_infinite(type(args))
    for entry in fields(args):
        name = entry.name
        given = getattr(args, name)
        value = plain(given)
        if value is not given:
            setattr(args, name, value)
        if name not in args._written or value is entry.default:
            continue
        check_holdable(name, value)
        if name in infinite and isinstance(value, str) and _is_infinite(value):
            setattr(args, name, float(value))
        elif not isinstance(value, _TAKEN_BESIDE.get(name, ())) and not _holds(name, value, hints[name]):
            such = f", such as {entry.default}" if value is None and hints[name] is str and entry.default else ""
            raise ConfigError(f"{name} is {_told(name, value)}; {_wanted(name, hints[name])}{such}.")
        elif isinstance(value, str):
            _check_text(args, name, value)
        elif name == "fsdp" and isinstance(value, list | tuple):
            _check_sharding(value)


_hints = functools.cache(typing.get_type_hints)


def _holds(name: str, value, hint) -> bool:
    """Tell whether a field with this annotation may have the value; of kinds that are not known it may."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_holds(name, value, part) for part in parts)
    if origin is typing.Literal:
        return any(value is part or (type(value) is type(part) and value == part) for part in parts)
    kind = origin or hint
    if kind is list:
        # what is nested deeper is its owner's to judge
        plain = [part for part in parts if part in _ITEMS]
        return isinstance(value, list | tuple) and all(_holds(name, item, part) for item in value for part in plain)
    if kind is dict:
        return isinstance(value, Mapping)
    if kind is bool:
        return isinstance(value, bool) or (type(value) is int and value in (0, 1))
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is str:
        takes_path = name in _PATHS or name.endswith(_PATH_ENDINGS)
        return isinstance(value, (str, os.PathLike) if takes_path else str)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return isinstance(value, kind | str)
    return not isinstance(kind, type) or isinstance(value, kind)


def _is_infinite(text: str) -> bool:
    try:
        return math.isinf(float(text))
    except ValueError:
        return False


def _check_text(args, name: str, text: str) -> None:
    """Refuse texts that stand for no value of the field, where upstream would only trip over them."""
    if name in getattr(args, "_VALID_DICT_FIELDS", ()):
        takes = "it takes a mapping, such as `{key: value}`, or one as JSON"
        if name in _JSON_FILES:
            takes += ", or the path of a JSON file"
            text = content_of(text, takes_base64=name == "deepspeed")
        with_mapping = text == "" and name == "deepspeed"
        try:
            with_mapping = with_mapping or isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            pass
        if not with_mapping:
            raise ConfigError(f"{name} is {_told(name, getattr(args, name))}; {takes}.")
    elif name == "fsdp":
        _check_sharding(text.split())
    elif name == "pad_to_multiple_of" and not (text.lower() in ("auto", "none", "null") or text.strip().isdecimal()):
        raise ConfigError(f"{name} is {text!r}; it takes a whole number, auto or null.")


def _check_sharding(words) -> None:
    for word in words:
        check_choice("fsdp", word, [option.value for option in FSDPOption])


def content_of(text: str, takes_base64: bool) -> str:
    """Return the JSON that a text is, encodes or names as a file; the text itself where it does none of that."""
    if text.startswith("{"):
        return text
    try:
        if Path(text).is_file():
            return Path(text).read_text(encoding="utf-8")
        return base64.urlsafe_b64decode(text).decode("utf-8") if takes_base64 and text else text
    except (OSError, ValueError):
        return text


def _told(name: str, value) -> str:
    if is_secret_name(name):
        return f"a {type(value).__name__}"
    text = repr(without_secrets(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _wanted(name: str, hint) -> str:
    kind = FieldType(name, hint)
    objects = [part.__name__ for part in kind.kinds if part not in (bool, int, float, str, dict, list)]
    if objects and not kind.choices and str not in kind.kinds:
        return f"it takes {' or '.join(f'a {name} object' for name in objects)}{', or null' * kind.optional}"
    items = [_ITEMS[part] for kind in _lists_in(hint) for part in typing.get_args(kind) if part in _ITEMS]
    lists = f"a list of {' or '.join(items)}" if items else "a list"
    if kind.only_list and name not in _TAKEN_BESIDE:
        # a single item in its place is for YAML and the command line
        return f"it takes {lists}{' or null' * kind.optional}"
    return kind.wanted().replace("a list", lists)


def _lists_in(hint) -> list:
    return [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is list]
