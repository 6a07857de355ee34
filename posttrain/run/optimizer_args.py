"""The text of `optim_args`: `name=value,name=value`, each value of the kind that the optimizer's signature has."""

import contextlib
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping

from posttrain.checks import near
from posttrain.errors import ConfigError

# what other settings say
_ELSEWHERE = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_BRACKETS = {"(": ")", "[": "]"}
_SIMPLE = (bool, int, float, str)
# a number that stands by itself within a value
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.])")
# what help and errors show, by the optimizer that takes it
EXAMPLES = {"sgd": "momentum=0.9,nesterov=true", "pytorch_optimizer:ademamix": "betas=(0.9,0.999,0.9999),alpha=5"}


def split(text: str | None) -> dict[str, str]:
    """Return the values by name, as texts; commas in brackets part nothing.

    Raises ConfigError for a part without `=`, a name twice, or a bracket that is not closed.
    """
    parts, waiting, part = [], [], ""
    for letter in text or "":
        if letter == "," and not waiting:
            parts, part = [*parts, part], ""
            continue
        part += letter
        if letter in _BRACKETS:
            waiting.append(_BRACKETS[letter])
        elif letter in _BRACKETS.values() and (not waiting or waiting.pop() != letter):
            raise ConfigError(f"optim_args is {text!r}, with a bracket that is not closed or not opened.")
    if waiting:
        raise ConfigError(f"optim_args is {text!r}, with a bracket that is not closed or not opened.")
    found = {}
    for one in (one.strip() for one in [*parts, part]):
        name, equals, value = (word.strip() for word in one.partition("="))
        if not one and not found and not parts:
            continue
        if not (name and equals and value):
            raise ConfigError(f"optim_args is {text!r}; write name=value,name=value, such as {_shown()}.")
        if name in found:
            raise ConfigError(f"optim_args names {name} twice; keep one.")
        found[name] = value
    return found


def canonical(text: str | None) -> str | None:
    """Return the text as it is compared: `momentum=0.90` is `momentum=0.9`, in whatever order and spacing.

    A text that `split` refuses is returned as it is.
    """
    try:
        found = split(text)
    except ConfigError:
        return text
    found = {name: _NUMBER.sub(_same_number, "".join(value.split())) for name, value in sorted(found.items())}
    return ",".join(f"{name}={value}" for name, value in found.items()) or None


def _same_number(found: re.Match) -> str:
    return repr(float(found[0]))


def _shown() -> str:
    return " and ".join(f"`optim_args: {text}` of optim {name}" for name, text in EXAMPLES.items())


def refuse_elsewhere(names: Iterable[str]) -> None:
    """Raise ConfigError for a name that other settings say: a trainer's groups would take its place."""
    for name in names:
        if name in _ELSEWHERE:
            raise ConfigError(f"optim_args names {name}, which has a setting of its own: {_ELSEWHERE[name]}.")


def read(kind: type, text: str | None, optim: str) -> dict[str, object]:
    """Return the arguments of an optimizer beside rate and weight decay, each of the kind that its default has.

    Args:
        kind: the class. text: of `optim_args`. optim: its name, for errors.

    Raises:
        ConfigError: a name that the signature has not, which such classes would swallow without a word; a value of
            another kind; an argument without default that is not given.
    """
    known, hints = arguments(kind), _hints(kind)
    found = {}
    given = split(text)
    refuse_elsewhere(given)
    for name, value in given.items():
        if name not in known:
            close = near(name, known)
            hint = f"Did you mean {close}? " if close else ""
            takes = ", ".join(known) or "nothing"
            raise ConfigError(f"optim_args names {name!r}, which optim {optim} does not take. {hint}It takes {takes}.")
        found[name] = _cast(name, value, known[name], hints.get(name, known[name].annotation))
    missing = [name for name, one in known.items() if one.default is inspect.Parameter.empty and name not in found]
    if missing:
        raise ConfigError(
            f"optim {optim} needs {', '.join(missing)}, which have no default. Write `optim_args: {missing[0]}=...`."
        )
    return found


def arguments(kind: type) -> Mapping[str, inspect.Parameter]:
    """Return what an optimizer's constructor takes by name beside parameters, rate and weight decay."""
    known = list(inspect.signature(kind.__init__).parameters.values())[2:]
    collected = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
    return {one.name: one for one in known if one.kind not in collected and one.name not in _ELSEWHERE}


def takes(kind: type, name: str) -> bool:
    """Tell whether an optimizer's constructor takes an argument of this name, and does not only swallow it."""
    return name in inspect.signature(kind.__init__).parameters


def _hints(kind: type) -> dict[str, object]:
    with contextlib.suppress(Exception):
        return typing.get_type_hints(kind.__init__)
    return {}


def _cast(name: str, text: str, parameter: inspect.Parameter, hint):
    default = None if parameter.default is inspect.Parameter.empty else parameter.default
    kinds, choices = _kinds(hint)
    if isinstance(default, tuple | list):
        return _sequence(name, text, default)
    if text.lower() in ("none", "null"):
        if default is None or type(None) in kinds:
            return None
        raise ConfigError(f"optim_args: {name} is {text}; it takes {_words(_of(default, kinds))}.")
    if choices and str not in kinds:
        if text not in choices:
            raise ConfigError(f"optim_args: {name} is {text!r}; it must be one of {', '.join(map(str, choices))}.")
        return text
    if default is not None and not isinstance(default, _SIMPLE):
        raise ConfigError(
            f"optim_args: {name} takes a {type(default).__name__}, which no text says. Leave it at its default."
        )
    wanted = _of(default, kinds)
    if text[0] in _BRACKETS and str not in wanted:
        if default is None and not wanted & {bool, int, float}:
            return _sequence(name, text, None)
        raise ConfigError(f"optim_args: {name} is {text}; it takes {_words(wanted)}.")
    for one in (bool, int, float, str):
        if one in wanted or not wanted:
            with contextlib.suppress(ValueError):
                return _READ[one](text)
    raise ConfigError(f"optim_args: {name} is {text!r}; it takes {_words(wanted)}.")


def _of(default, kinds: set) -> set:
    """Return the simple kinds that a value may be of: those of the annotation, else that of the default."""
    told = kinds & set(_SIMPLE)
    if isinstance(default, bool):
        return {bool}
    if told:
        # where a number's annotation is float, a whole number is one too
        return told - {int} if float in told else told
    if isinstance(default, int):
        # without an annotation: 1 may stand for a number
        return {int, float}
    return {type(default)} if default is not None else set()


def _kinds(hint) -> tuple[set, list]:
    """Return the types in an annotation, and what a literal in it allows."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    choices = [value for one in parts if typing.get_origin(one) is typing.Literal for value in typing.get_args(one)]
    return {one for one in parts if isinstance(one, type)}, choices


def _sequence(name: str, text: str, default) -> tuple:
    length = None if default is None else len(default)
    example = f"({','.join(map(str, default))})" if default else "(0.9,0.999)"
    wanted = f"optim_args: {name} is {text}; it takes numbers in brackets, such as {name}={example}"
    if text[0] not in _BRACKETS or text[-1] != _BRACKETS[text[0]]:
        raise ConfigError(f"{wanted}.")
    words = [word.strip() for word in text[1:-1].split(",")]
    words = words[:-1] if words[-1] == "" else words
    if length is not None and len(words) != length:
        raise ConfigError(f"{wanted}: {length} of them.")
    made = []
    for place, word in enumerate(words):
        own = default[place] if default is not None and place < len(default) else 0.0
        if word.lower() in ("none", "null") and own is None:
            made.append(None)
            continue
        try:
            made.append(_integer(word) if isinstance(own, int) and not isinstance(own, bool) else _number(word))
        except ValueError:
            raise ConfigError(f"{wanted}.") from None
    return tuple(made)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ValueError(text)


def _integer(text: str) -> int:
    number = _number(text)
    if not number.is_integer() or abs(number) > 2**63:
        raise ValueError(text)
    return int(number)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


_READ = {bool: _boolean, int: _integer, float: _number, str: str}


def _words(kinds: set) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    kinds = kinds - {int} if float in kinds else kinds
    return " or ".join(word for one, word in names.items() if one in kinds) or "a number"
