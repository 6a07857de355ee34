"""The library's one logger: plain lines on stderr from the main process, warnings from the others."""

import logging
import os
import sys

from posttrain.private import hide
from posttrain.visible import visible

_logger = logging.getLogger("posttrain")


class _Stderr(logging.StreamHandler):
    """Writes to what `sys.stderr` is at the time: a notebook or a test puts others in its place."""

    def emit(self, record):
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record):
        """Return the line without secrets and with control characters written out."""
        return visible(hide(super().format(record)))


def get_logger() -> logging.Logger:
    """Return the `posttrain` logger. `POSTTRAIN_LOG` sets its level (default `info`; `warning` silences the notes)."""
    if not _logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("posttrain: %(message)s"))
        _logger.addHandler(handler)
        _logger.propagate = False
        main = os.environ.get("RANK", "0") == "0"
        _logger.setLevel(os.environ.get("POSTTRAIN_LOG", "info").upper() if main else logging.WARNING)
    return _logger
