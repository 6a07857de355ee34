"""Standard output and error that do not end a run: what their reader, disk or terminal does not take is dropped."""

import contextlib
import errno
import io
import os
import sys

# of a disk that may have room again
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def keep_going() -> None:
    """Have this process go on, to its end, where its output or errors cannot be written: they are dropped.

    A pipe whose reader has gone, a terminal that was closed and the like are left for good, by C code and by what is
    forked as well; a disk that is full is tried again with each write. What a caller has put in their place stays.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # closed by whoever started the process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _over(stream))


def _over(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Return a stream to the same file as another, of the same form, that drops what it cannot write."""
    raw = _Dropping(stream.fileno(), "w", closefd=False)
    raw.name = stream.name
    with contextlib.suppress(OSError):
        stream.flush()
    buffered = raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw)
    text = io.TextIOWrapper(
        buffered, stream.encoding, stream.errors, "\n" if os.linesep == "\n" else None, stream.line_buffering,
        stream.write_through,
    )  # fmt: skip
    text.mode = "w"
    return text


class _Dropping(io.FileIO):
    def write(self, content) -> int | None:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in _FULL:
                _leave(self.fileno())
            return memoryview(content).nbytes


def _leave(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, descriptor)
        if nothing != descriptor:
            os.close(nothing)
