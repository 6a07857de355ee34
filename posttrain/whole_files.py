"""Files that are there whole or not at all: synced, replaced at once, locked for writers, set aside where damaged."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from posttrain.errors import EnvironmentIssue
from posttrain.log import get_logger

# of a file system that has no locks; filelock knows ENOSYS itself
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP}
_BLOCK = 1 << 20


@contextlib.contextmanager
def answered(what: str, mend: str) -> Iterator[None]:
    """Raise EnvironmentIssue for what the disk refuses inside.

    Args:
        what: the beginning of a sentence, "the cache X cannot be written".
        mend: a sentence that tells what to do.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise EnvironmentIssue(f"{what}: {reason}. {mend}") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file's writers inside, which stands in a hidden file beside it and ends with the process.

    Where the file system has no locks, writers go on without: a file is then whole all the same, and entries of one of
    two writers at once may be lost. Raises OSError where the lock's file cannot be made.
    """
    from filelock import FileLock

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        get_logger().info("%s is written without a lock, which its file system does not have", path)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Put what `write` writes to a path of its own in the place of `path`, at once and synced.

    Call it under the lock of `path`: what killed writers left behind is deleted.
    """
    for leftover in path.parent.glob(f".{path.name}-*.partial"):
        leftover.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}-{uuid.uuid4().hex}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        # safetensors' own are for their owner alone
        partial.chmod(mode)
        sync(partial)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk; some file systems sync no folders."""
    folder = path.is_dir()
    with contextlib.suppress(OSError) if folder else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def not_plain(folder: Path, enter: Callable[[str], bool], above: str = "") -> Iterator[str]:
    """Yield the paths in a folder, relative to it, of what is neither regular file nor folder: links, pipes, devices.

    `enter`: tells of a folder in it, by its relative path, whether to look into it; no link is followed.
    """
    with contextlib.suppress(OSError), os.scandir(folder / above) as entries:
        for entry in entries:
            name, mode = above + entry.name, entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                if enter(name):
                    yield from not_plain(folder, enter, f"{name}/")
            elif not stat.S_ISREG(mode):
                yield name


def set_aside(path: Path, fault: str) -> None:
    """Rename a file or folder that cannot be used, so that it is there to look at, and say so."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged{number}")):
        number += 1
    os.replace(path, aside)
    get_logger().warning("%s %s; it is set aside as %s, and made anew", path, fault, aside.name)


def digest(path: Path) -> str:
    """Digest a file's content against damage, not against forgery: xxh3, 128 bits."""
    import xxhash

    content = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            content.update(block)
    return content.hexdigest()


def digest_of_tensors(head: str, tensors: Mapping) -> str:
    """Digest named tensors of any shape, with what stands before them, as `digest` does a file."""
    import torch
    import xxhash

    content = xxhash.xxh3_128(head.encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        content.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return content.hexdigest()
