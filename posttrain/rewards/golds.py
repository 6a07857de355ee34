"""Gold answers: which values are one, and their text."""

import math
from decimal import Decimal

from posttrain.errors import DataError


def gold_text(value, column: str, place: str = "") -> str:
    """Return the text of a gold answer, which is a text or a number.

    `column`: what it is called in errors. Raises DataError for a list, an object, and a missing value: null, a blank
    text, or the NaN that pandas writes; with `place` where it is given.
    """
    if is_missing(value) or not isinstance(value, str | int | float | Decimal) or not _is_finite(value):
        raise DataError(
            f"{f'{place}: ' if place else ''}{column!r}, the gold answer, is {_missing_kind(value)}; it must be a text "
            "or a number. Mend the row, or leave it out."
        )
    return str(value).strip()


def is_missing(value) -> bool:
    """Tell whether a value stands for none: null, NaN, or a blank text."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def _is_finite(value) -> bool:
    return isinstance(value, str | int) or math.isfinite(value)


def _missing_kind(value) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "an empty text" if not value else "a blank text"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, float | Decimal):
        return f"{value}, a missing value" if math.isnan(value) else str(value)
    return f"of type {type(value).__name__}"
