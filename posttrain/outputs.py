"""Standard output and error that do not end a run: what their reader, disk or terminal does not take is dropped."""

import contextlib
import errno
import io
import os
import select
import sys

# of a disk that may have room again
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
            if error.errno not in FULL:
                leave(self.fileno())
            return memoryview(content).nbytes


def left_without_reader() -> bool:
    """Tell whether the reader of standard output or error has gone, and leave such a stream for good."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        # none of a stream that was closed, or that a caller has put in its place
        with contextlib.suppress(AttributeError, OSError, ValueError):
            descriptor = stream.fileno()
            if _has_no_reader(descriptor):
                leave(descriptor)
                found = True
    return found


def _has_no_reader(descriptor: int) -> bool:
    if not hasattr(select, "poll"):
        # not told here: of the two that this is asked of, one has none
        return True
    asked = select.poll()
    asked.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))


def leave(descriptor: int) -> None:
    """Have what is written to a descriptor, by C code and by what is forked as well, go nowhere."""
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, descriptor)
        if nothing != descriptor:
            os.close(nothing)
