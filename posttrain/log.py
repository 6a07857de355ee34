"""The library's one logger: plain lines on stderr from the main process, warnings from the others."""

import logging
import os
import sys

from posttrain.errors import ConfigError
from posttrain.private import hide
from posttrain.visible import one_line, visible

LEVELS = ("debug", "info", "warning", "error", "critical")
_logger = logging.getLogger("posttrain")


class _Stderr(logging.StreamHandler):
    """Writes to what `sys.stderr` is at the time: a notebook or a test puts others in its place."""

    def emit(self, record):
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record):
        """Return the line without secrets and with control characters written out."""
        return visible(hide(super().format(record)))


def level_of(name: str) -> int:
    """Return the number of a level; ConfigError where there is none of that name."""
    if name.lower() not in LEVELS:
        raise ConfigError(f"POSTTRAIN_LOG is {one_line(name)!r}; it must be one of {', '.join(LEVELS)}.")
    return logging.getLevelNamesMapping()[name.upper()]


def get_logger() -> logging.Logger:
    """Return the `posttrain` logger. `POSTTRAIN_LOG` sets its level (default `info`; `warning` silences the notes).

    ConfigError where it is no level.
    """
    if not _logger.handlers:
        main = os.environ.get("RANK", "0") == "0"
        level = level_of(os.environ.get("POSTTRAIN_LOG", "info")) if main else logging.WARNING
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("posttrain: %(message)s"))
        _logger.addHandler(handler)
        _logger.propagate = False
        _logger.setLevel(level)
    return _logger
