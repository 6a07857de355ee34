"""Checks of single values: names that are known, numbers in a range."""

import difflib
import math
from collections.abc import Iterable, Sequence

from posttrain.errors import ConfigError


def near(value, known: Iterable[str]) -> str | None:
    """Return the name of `known` that `value` looks like most, None where it looks like none of them."""
    return next(iter(difflib.get_close_matches(str(value), list(known), n=1)), None)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`, with the nearest of them."""
    if value in allowed:
        return
    close = near(value, allowed)
    hint = f" Did you mean {close}?" if close else ""
    raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.{hint}")


def shorten(value, length: int = 80) -> str:
    """Shorten a value for a message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 10]}...{text[-7:]}"


def check_integer(name: str, value, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{name}={value!r} must be an integer {span}.")


def check_number(name: str, value, low: float, high: float | None = None, above: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < low or (above and value == low) or (high is not None and value > high):
        span = f"{'above' if above else 'of at least'} {low}" + (f" and at most {high}" if high is not None else "")
        raise ConfigError(f"{name}={value!r} must be a number {span}.")
