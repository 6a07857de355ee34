"""Who started this process, as it was when the library was first imported: it may have ended since."""

import os
from pathlib import Path


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        # a system without /proc
        import psutil

        try:
            return psutil.Process(pid).cmdline()
        except psutil.Error:
            return []


PARENT = os.getppid()
PARENTS_WORDS = _words(PARENT)
