"""Conversion of what a YAML file or a command line says to the type of a dataclass field."""

import contextlib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import is_dataclass
from enum import Enum

import yaml

from posttrain.checks import near


class BadValue(Exception):
    """A value of the wrong type. No ValueError: argparse would put its own words in the place of these."""


def _written(text: str):
    """Return the value that a text of JSON, else of YAML, writes; the text itself where it writes none."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
        return yaml.safe_load(text)
    return text


class FieldType:
    """What a field takes, read from its annotation, and the conversion of a value to it."""

    def __init__(self, name: str, hint, choices: Sequence | None = None):
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        members = typing.get_args(hint) if is_union else (hint,)
        self.name = name
        self.optional = type(None) in members
        self.mapping = any(m is dict or typing.get_origin(m) is dict for m in members)
        items = [typing.get_args(m) for m in members if typing.get_origin(m) is list]
        self.list = bool(items)
        # of mappings, such as TRL's `datasets`; their owner reads them
        self.records = any(is_dataclass(kind) for kind in (items[0] if items else ()))
        plain = [m for m in members if isinstance(m, type) and m is not type(None)]
        self.numbers = any(kind in (int, float) for part in items for kind in part)
        # lists of lists, and of records, which may be written as one list
        self.nested = self.records or any(typing.get_origin(kind) is list for part in items for kind in part)
        # argparse gives a list to a field that takes nothing but lists.
        self.only_list = self.list and not plain
        self.kinds = [*plain, *(items[0] if self.only_list else ())]
        enums = [member.value for kind in self.kinds if issubclass(kind, Enum) for member in kind]
        literals = [v for m in members if typing.get_origin(m) is typing.Literal for v in typing.get_args(m)]
        self.choices = list(choices or enums or (literals if not self.kinds else ()))

    def from_yaml(self, value):
        """Convert a value as YAML reads it."""
        if self.records and value is not None:
            return value
        if value is None and self.optional:
            return None
        if isinstance(value, list) and self.list:
            return [self.from_scalar(item) for item in value] if self.only_list else value
        if isinstance(value, dict) and self.mapping:
            return value
        return [self.from_scalar(value)] if self.only_list else self.from_scalar(value)

    def from_scalar(self, value):
        """Convert a scalar of YAML, or text of the command line."""
        if self.records:
            with contextlib.suppress(yaml.YAMLError):
                value = yaml.safe_load(value)
            return value
        text = shown(value)
        # lists within lists come from a command line as one text
        if self.list and not self.only_list and text.lstrip().startswith("["):
            with contextlib.suppress(yaml.YAMLError):
                return yaml.safe_load(text)
        if isinstance(value, bool) and bool not in self.kinds and (self.choices or str in self.kinds):
            raise BadValue(
                f"`{self.name}` is {text}, which YAML also reads from a bare yes, no, on or off; "
                f"{self.wanted()}, in quotes."
            )
        if value is None or isinstance(value, (dict, list)):
            raise BadValue(f"`{self.name}` is {kind_of(value)}; {self.wanted()}.")
        if self.choices:
            for choice in self.choices:
                if text == shown(choice):
                    return choice
        elif self.optional and str not in self.kinds and text.lower() in ("none", "null"):
            return None
        elif not self.mapping and not set(self.kinds) & set(_CONVERSIONS):
            # A dataclass and the like, which only its owner can judge.
            return value
        else:
            for kind in filter(self.kinds.__contains__, _CONVERSIONS):
                # Where both are taken, `no` is the text.
                if kind is bool and str in self.kinds and text not in ("true", "false"):
                    continue
                with contextlib.suppress(ValueError):
                    return _CONVERSIONS[kind](text)
        close = near(text, map(shown, self.choices))
        hint = f" Did you mean {close}?" if close else ""
        raise BadValue(f"`{self.name}` is {text!r}; {self.wanted()}.{hint}")

    def from_word(self, text: str):
        """Convert a word of the command line, which holds a mapping or a list of numbers as YAML or JSON writes it."""
        opening = text.lstrip()[:1]
        if opening == "{" and self.mapping or opening == "[" and self.only_list and self.numbers:
            made = _written(text)
            if isinstance(made, dict):
                return made
            if isinstance(made, list):
                return self.from_yaml(made)
        return self.from_scalar(text)

    def from_words(self, value):
        """Put words of the command line together: of a single one that is a list, its items."""
        alone = isinstance(value, list) and len(value) == 1 and isinstance(value[0], list)
        return value[0] if alone and not self.nested else value

    def wanted(self) -> str:
        """Tell what it takes, in words."""
        if self.choices:
            words = [shown(choice) for choice in self.choices]
        else:
            words = [word for kind, word in _WORDS.items() if kind in self.kinds]
            words += ["a list"] * self.list + ["a mapping"] * self.mapping + ["null"] * self.optional
        return "it takes " + " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "t", "y"):
        return True
    if text.lower() in ("false", "no", "0", "f", "n"):
        return False
    raise ValueError(text)


def _integer(text: str) -> int:
    """Read a whole number, also 1e3, which YAML reads as text."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number) if set(text.lower()) & set(".e") else int(text)


# The narrowest first.
_CONVERSIONS = {bool: _boolean, int: _integer, float: float, str: str}


def shown(value) -> str:
    """Write a value as one would in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def kind_of(value) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "empty", str: "text"}
    return names.get(type(value), f"`{shown(value)}`")
