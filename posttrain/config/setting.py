"""Fields of configs that say what they mean beyond their value; identity, card and checks of values ask them."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from types import MappingProxyType
from typing import NamedTuple


class Meaning(NamedTuple):
    """What a field of a config declares of itself beside type and default: its part in resuming, card and checks.

    Attributes:
        identity: whether a run that goes on must share it; a callable decides that by the config; a name is of the
            attribute that counts in its place, and every field that the attribute reads names it.
        card: whether the model card tells it, where it, or a preset's default, is not at its default; a callable says
            by the config whether it tells it in any case. What may be in the identity, the card tells.
        infinite: whether it may be infinity.
        default: of the class that declares it.
    """

    identity: bool | str | Callable
    card: bool | Callable
    infinite: bool
    default: object


class _Help(str):
    """The text of `--help` with the field's meaning: parsers hand all metadata to argparse, which takes no other."""

    meaning: Meaning


def setting(default, help: str, *, identity, card, infinite: bool = False):
    """Declare a field of a config; the arguments are those of `Meaning`, and `help` is its text in `--help`."""
    text = _Help(help)
    text.meaning = Meaning(identity, card, infinite, default)
    return field(default=default, metadata={"help": text})


@functools.cache
def meanings(config_class: type) -> Mapping[str, Meaning]:
    """Return what each field declares that a class, or one that it stands on, made with `setting`; its own first."""
    found: dict[str, Meaning] = {}
    for kind in reversed(config_class.__mro__):
        texts = {name: entry.metadata.get("help") for name, entry in vars(kind).get("__dataclass_fields__", {}).items()}
        own = {n: text.meaning for n, text in texts.items() if isinstance(text, _Help) and n not in found}
        found = own | found
    return MappingProxyType(found)


def undeclared(config_class: type) -> list[str]:
    """Return the fields that a class of this library declares without a meaning; those of upstream's need none."""
    upstream = {
        name
        for kind in config_class.__mro__
        if not kind.__module__.startswith("posttrain.")
        for name in vars(kind).get("__dataclass_fields__", {})
    }
    own = {
        name
        for kind in config_class.__mro__
        if kind.__module__.startswith("posttrain.")
        for name in vars(kind).get("__annotations__", {})
        if name in {entry.name for entry in fields(config_class)}
    }
    return sorted(own - upstream - meanings(config_class).keys())


def identity_of(args) -> dict[str, object]:
    """Return the settings that a run which goes on must share with the one that it goes on from, by name."""
    found = {}
    for part in _parts(args):
        for name, meaning in meanings(type(part)).items():
            if isinstance(meaning.identity, str):
                found[meaning.identity] = getattr(part, meaning.identity)
            elif meaning.identity(part) if callable(meaning.identity) else meaning.identity:
                found[name] = getattr(part, name)
    return found


def before_declared(config_class: type) -> dict[str, object]:
    """Return what the entries of an identity were in a run of a version without them, by name.

    Those of a field alone were its default, unless that is None, in whose place a config may put another value. Those
    that count in place of fields were None.
    """
    known = meanings(config_class).items()
    own = {name: own.default for name, own in known if own.identity is True and own.default is not None}
    return own | {own.identity: None for _, own in known if isinstance(own.identity, str)}


def told_in_card(args) -> dict[str, object]:
    """Return the settings that a model card tells of a run, by name, in the order of their declaration."""
    found = {}
    for part in _parts(args):
        for name, meaning in meanings(type(part)).items():
            value = getattr(part, name)
            # a preset's default differs, so that the parent's is a choice as well
            preset = type(part).__dataclass_fields__[name].default != meaning.default
            always = preset or (callable(meaning.card) and meaning.card(part))
            if meaning.card and (always or value != meaning.default):
                found[name] = value
    return found


def _parts(args) -> list:
    """Return a config and, where they stand beside it, the settings of a private run."""
    privacy = getattr(args, "privacy", None)
    return [args] if privacy is None or privacy is args else [args, privacy]


def defaults_of(kind: type) -> dict[str, object]:
    """Return the default of each field of a dataclass."""
    made = {entry.name: entry.default_factory() for entry in fields(kind) if entry.default_factory is not MISSING}
    return {entry.name: entry.default for entry in fields(kind)} | made


def may_be_infinite(config_class: type) -> set[str]:
    """Return the names of the fields that infinity is a value of."""
    return {name for name, meaning in meanings(config_class).items() if meaning.infinite}
