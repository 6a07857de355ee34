"""What the verbs and recipes print: texts of others are shown as text, and no secret is shown."""

import json
import sys
import traceback

from posttrain.private import hide
from posttrain.visible import visible, visible_json


def say(*parts, end: str = "\n", flush: bool = False, file=None) -> None:
    """Print texts as `print` does, with control characters written out."""
    print(visible(" ".join(map(str, parts))), end=end, flush=flush, file=file)


def complain(text: str) -> None:
    """Print an error to stderr, without secrets and with control characters written out."""
    say(hide(text), file=sys.stderr)


def say_json(content, indent: int | None = None, **options) -> None:
    """Print JSON of which no character steers a console."""
    print(visible_json(json.dumps(content, indent=indent, **options)))


def guard_tracebacks() -> None:
    """Have tracebacks of this process printed without secrets and with control characters written out."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _show


def _show(kind, error, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    complain("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))
