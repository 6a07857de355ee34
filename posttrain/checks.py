"""Checks of single values: names that are known, numbers in a range."""

import contextlib
import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from urllib.parse import unquote

from posttrain.errors import ConfigError
from posttrain.visible import one_line


def near(value, known: Iterable[str]) -> str | None:
    """Return the name of `known` that `value` looks like most, None where it looks like none of them."""
    return next(iter(difflib.get_close_matches(str(value), list(known), n=1)), None)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`, with the nearest of them."""
    # an array is equal to nothing as a whole
    if any(isinstance(value, type(one)) and value == one for one in allowed):
        return
    close = near(value, allowed)
    hint = f" Did you mean {close}?" if close else ""
    raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.{hint}")


def check_links(path: str | Path, name: str) -> None:
    """Raise ConfigError where a link on the way to `path`, or the path itself, leads nowhere or to itself.

    `name`: of the setting.
    """
    whole = Path(path).absolute()
    for part in (*reversed(whole.parents), whole):
        with contextlib.suppress(OSError):
            if part.is_symlink() and not part.exists():
                raise ConfigError(
                    f"{name} is {one_line(path)}, and {one_line(part)} is a link that leads nowhere "
                    f"({one_line(os.readlink(part))}). Remove it, or choose another."
                )


def check_option(owner: str, option: str, known: Sequence[str], noun: str = "option") -> None:
    """Raise ConfigError unless an option of `owner` is one of those it has, with the nearest of them."""
    if option not in known:
        close = near(option, known)
        hint = f"; did you mean {close!r}?" if close else "."
        raise ConfigError(f"{owner} has no {noun} {option!r} (it has {', '.join(known)}){hint}")


def parse_query(query: str, owner: str, noun: str = "options") -> dict[str, str]:
    """Parse `key=value&key=value`, as it follows the `?` of a name, into texts; a + stays one.

    Raises:
        ConfigError: a part without `=`, or a key twice; the message begins with `owner`.
    """
    parsed = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{owner}: write {noun} as key=value, joined by &.")
        if key in parsed:
            raise ConfigError(f"{owner}: {key} is given twice; keep one.")
        parsed[key] = unquote(value)
    return parsed


def parse_scalar(text: str):
    """Parse a text of a query: a number, true, false or null where it is one of these, else the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "null": None}.get(text, text)


def is_beyond_floats(value) -> bool:
    """Tell whether a value is or holds a number, whole or a fraction, that is larger than any float."""
    if isinstance(value, Mapping):
        return any(map(is_beyond_floats, value.values()))
    if isinstance(value, list | tuple):
        return any(map(is_beyond_floats, value))
    if not isinstance(value, Real):
        return False
    try:
        float(value)
    except OverflowError:
        return True
    return False


def check_holdable(name: str, value) -> None:
    """Raise ConfigError for a number larger than any float; it is not shown, as it may have thousands of digits."""
    if is_beyond_floats(value):
        holds = "is" if isinstance(value, Real) else "holds"
        raise ConfigError(f"{name} {holds} a number beyond 1.8e308, the largest of a float; give a smaller one.")


def plain(value):
    """Return numpy's numbers, booleans, texts and arrays as Python's own, also within lists, tuples and mappings.

    Other libraries' real numbers, such as fractions, become floats. What holds none of these is returned itself.
    """
    # by name, as this module is imported where numpy is not
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Real) and not isinstance(value, int | float) and not is_beyond_floats(value):
        return int(value) if isinstance(value, Integral) else float(value)
    if type(value) not in (list, tuple, dict):
        return value
    items = value.values() if isinstance(value, dict) else value
    made = [plain(item) for item in items]
    if all(one is item for one, item in zip(made, items, strict=True)):
        return value
    return dict(zip(value, made, strict=True)) if isinstance(value, dict) else type(value)(made)


def shorten(value, length: int = 80) -> str:
    """Shorten a value for a message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 10]}...{text[-7:]}"


def check_integer(name: str, value, low: int, high: int | None = None) -> int:
    """Return a whole number as Python's own. Raises ConfigError for what is none, or out of range."""
    value = plain(value)
    check_holdable(name, value)
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{name}={value!r} must be an integer {span}.")
    return value


def check_number(name: str, value, low: float, high: float | None = None, above: bool = False) -> float:
    """Return a number as Python's own. Raises ConfigError for what is none, not finite, or out of range."""
    value = plain(value)
    check_holdable(name, value)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < low or (above and value == low) or (high is not None and value > high):
        span = f"{'above' if above else 'of at least'} {low}" + (f" and at most {high}" if high is not None else "")
        raise ConfigError(f"{name}={value!r} must be a number {span}.")
    return value
