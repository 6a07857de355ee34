"""The exit code of a run, kept in a file: `accelerate launch` may end with another one."""

import contextlib
import os
from pathlib import Path

from posttrain.errors import ConfigError, DataError, DivergedError, EnvironmentIssue, Preempted

VARIABLE = "POSTTRAIN_EXIT_CODE_FILE"
# those that say why a run ended
OWN = frozenset(kind.exit_code for kind in (ConfigError, DataError, EnvironmentIssue, DivergedError, Preempted))


def forget() -> None:
    """Delete the code of an earlier run, or the file that `mktemp` made."""
    if path := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)


def keep(code: int, anew: bool = True) -> None:
    """Keep a code; the first one that is kept, or with `anew` false the last. One that cannot be written is unsaid."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    with contextlib.suppress(OSError), open(path, "x" if anew else "w") as file:
        file.write(str(code))


def kept(path: str | Path | None = None) -> int | None:
    """Return the code that was kept; None where there is none, or the disk was full. `path`: by default, as named."""
    path = path or os.environ.get(VARIABLE)
    try:
        code = int(Path(path).read_text()) if path else None
    except (OSError, ValueError):
        return None
    return code if code is not None and 0 <= code < 256 else None
