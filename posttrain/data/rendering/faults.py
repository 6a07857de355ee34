"""What a rendering does to a row."""

from typing import NamedTuple


class Fault(NamedTuple):
    """What a rendering does to a row.

    Attributes:
        key: faults of one key are counted together.
        what: what happens, in words. shown: the piece of the row. remedy: what to do.
        is_wrong: the model would learn something else than the row says; else it only sees or learns less.
        is_note: it is the template's design, and nothing is lost.
    """

    key: tuple
    what: str
    shown: str
    remedy: str
    is_wrong: bool = False
    is_note: bool = False


def short(text: str) -> str:
    """Return a text as messages show it, cut where it is long."""
    return text if len(text) <= 60 else text[:57] + "..."
