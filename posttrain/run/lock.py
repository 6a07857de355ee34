"""Holds a run folder for one run at a time: a lock of the file system, which ends with the process that holds it."""

import contextlib
import datetime
import errno
import json
import os
import socket
import threading
import time
from pathlib import Path

import torch

from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.log import get_logger
from posttrain.visible import one_line

NAME = ".posttrain.lock"
# errors of a file system that has no locks
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_HELD = {errno.EACCES, errno.EAGAIN}
# minutes after which a lock that no file system guards, and that nobody renewed, is nobody's
_STALE = 10

# seconds between two renewals of such a lock
_RENEWAL = 60.0

# this process's own, by the file's true path: the trainers by which it is held, None for others, the open file, the
# process's number, what ends its renewals, and the folder as it was named and found
_own: dict[Path, list] = {}
# the file system's locks keep no thread of a process from another
_taking = threading.Lock()


def _begin_anew() -> None:
    global _taking
    _taking = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def check_free(folder: str | Path) -> None:
    """Refuse a run folder that another process holds now. Raises ConfigError; writes nothing."""
    path = _path_in(folder)
    _refuse_other(path, folder)
    if not path.is_file() or _is_own(path):
        return
    with contextlib.suppress(OSError), path.open("r+b") as file:
        if _is_taken(file, path, shared=True):
            raise _refusal(path, folder)


@contextlib.contextmanager
def held(folder: str | Path, accelerator=None, trainer=None):
    """Hold a run folder inside, on the main process; the other ranks share its fate.

    A process may hold a folder several times over, but for two trainers at once; what it forks holds none. A lock whose
    process has ended is taken.

    Args:
        folder: of the run.
        accelerator: of the ranks that hold it together.
        trainer: the one that trains inside.

    Raises:
        ConfigError: another process holds it, which is named with its host, number and start, or another trainer.
        EnvironmentIssue: the folder cannot be written to.
    """
    is_main, problem, taken = accelerator is None or accelerator.is_main_process, [None], None
    if is_main:
        try:
            with _taking:
                taken = _take(Path(folder), trainer)
        except (ConfigError, EnvironmentIssue) as error:
            problem = [error]
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        told = [problem[0] and (type(problem[0]).__name__, str(problem[0]))]
        broadcast_object_list(told)
        if told[0] and problem[0] is None:
            problem = [{"ConfigError": ConfigError}.get(told[0][0], EnvironmentIssue)(told[0][1])]
    if problem[0] is not None:
        raise problem[0]
    try:
        yield
    finally:
        if taken is not None:
            _release(taken, trainer)
    if accelerator is not None and accelerator.num_processes > 1 and torch.distributed.is_initialized():
        # a rank that builds its next trainer at once must not find the lock of the one before
        accelerator.wait_for_everyone()


def check_held(folder: str | Path) -> None:
    """Refuse to go on in a run folder that this process holds where another has come into its place, before a write.

    A lock of this process that somebody has deleted is taken anew. A folder that it does not hold is passed over.

    Raises:
        EnvironmentIssue: the folder was renamed, moved or deleted, or another run has it.
    """
    named = os.path.abspath(folder)
    for path, entry in list(_own.items()):
        if entry[2] != os.getpid() or entry[4] != named:
            continue
        if not _is_folder(named, entry[5]):
            raise EnvironmentIssue(
                f"{one_line(folder)} is not the folder any more that this run began in: it was renamed, moved or "
                "deleted, so nothing is written. Where it was moved to, its checkpoints lie: start again with "
                "that output_dir and `resume_from_checkpoint: auto`."
            )
        if not _is_at(path, entry[1], unless=True):
            _take_again(path, entry, folder)


def _take_again(path: Path, entry: list, folder: str | Path) -> None:
    """Take a lock of this process, which somebody has deleted, unless another process has it meanwhile."""
    file = None
    with contextlib.suppress(OSError, ConfigError):
        _refuse_other(path, folder)
        file = open(path, "a+b", opener=_unfollowed)
        if not _is_taken(file, path) and _is_at(path, file):
            file.truncate(0)
            file.write(json.dumps(_ours()).encode())
            file.flush()
            entry[1].close()
            entry[1] = file
            return
    if file is not None:
        file.close()
    raise EnvironmentIssue(
        f"{one_line(folder)} is another run's since somebody deleted {NAME} there, by which this one held it; nothing "
        f"is written. The other: {_holder(_content(path))}."
    )


def _is_folder(named: str, status: os.stat_result) -> bool:
    """Tell whether a folder is the one that was found there; where nobody can tell, as on a lost network, it is."""
    try:
        return os.path.samestat(os.stat(named), status)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def _is_own(path: Path) -> bool:
    """Tell whether this process holds a lock, and not one that it was forked from."""
    return path in _own and _own[path][2] == os.getpid()


def _take(folder: Path, trainer) -> Path:
    path = _path_in(folder)
    if _is_own(path):
        holders = _own[path][0]
        if trainer is not None and any(holder not in (None, trainer) for holder in holders):
            raise ConfigError(
                f"output_dir is {one_line(folder)}, where another trainer of this process trains at this moment. Wait "
                "for its end, or choose another output_dir."
            )
        holders.append(trainer)
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            _refuse_other(path, folder)
            file = open(path, "a+b", opener=_unfollowed)
            # others may be asking at this moment whether it is free
            if _is_taken(file, path) and all(time.sleep(0.05) or _is_taken(file, path) for _ in range(5)):
                file.close()
                raise _refusal(path, folder)
            # the one before may have deleted the file in the meantime
            if _is_at(path, file):
                break
            file.close()
        # never by another open file: the lock ends with the first one that is closed
        file.seek(0)
        left = _parsed(file.read())
        if left:
            get_logger().info("%s: the run of %s ended without a word; its lock is taken", folder, _holder(left))
        file.truncate(0)
        file.write(json.dumps(_ours()).encode())
        file.flush()
        status = os.stat(path.parent)
    except OSError as error:
        raise EnvironmentIssue(f"{folder} cannot be written to: {error.strerror or error}") from error
    released = threading.Event()
    _own[path] = [[trainer], file, os.getpid(), released, os.path.abspath(folder), status]
    if not _is_guarded(file):
        # a long evaluation is no end of the run
        threading.Thread(target=_renew, args=(path, released), name="posttrain-lock", daemon=True).start()
    return path


def _path_in(folder: str | Path) -> Path:
    """Return the lock's true path, which is one by whatever links the folder is reached."""
    return Path(os.path.realpath(folder)) / NAME


def _refuse_other(path: Path, folder: str | Path) -> None:
    """Refuse what is no file of a lock, before it is opened: a link, a folder, a pipe."""
    if path.is_symlink() or path.exists() and not path.is_file():
        what = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "no regular file"
        raise ConfigError(
            f"output_dir is {one_line(folder)}, where {NAME} is {what}; a run holds its folder by a file of that name. "
            "Remove it, or choose another output_dir."
        )


def _unfollowed(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _is_at(path: Path, file, unless: bool = False) -> bool:
    """Tell whether an open file lies at a path itself, and not behind a link there; `unless`: where nobody can tell."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return unless


def _renew(path: Path, released: threading.Event) -> None:
    while not released.wait(_RENEWAL):
        with contextlib.suppress(OSError):
            os.utime(path)


def _is_guarded(file) -> bool:
    """Tell whether the file system keeps others off a file that this process has locked."""
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _release(path: Path, trainer) -> None:
    # a process that was forked meanwhile has no part in it
    if not _is_own(path):
        return
    entry = _own[path]
    entry[0].remove(trainer)
    if not entry[0]:
        del _own[path]
        entry[3].set()
        if _is_at(path, entry[1]):
            with contextlib.suppress(OSError):
                path.unlink()
        entry[1].close()


def _is_taken(file, path: Path, shared: bool = False) -> bool:
    """Take the lock if nobody has it; returns whether another process has.

    `shared`: beside others that take it so, as the ranks of a run do who ask at once whether it is free.
    """
    try:
        import fcntl
    except ImportError:
        # Windows: by its content alone
        return _is_recent(path)
    try:
        # not flock: workers that are forked would inherit it
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return True
        if error.errno in _NO_LOCKS:
            return _is_recent(path)
        raise
    return False


def _is_recent(path: Path) -> bool:
    """Tell whether another process has renewed its lock lately; one of this machine must still be there."""
    content = _content(path)
    if not content or content == _ours():
        return False
    if content.get("host") == socket.gethostname():
        # its number may have gone to another process since, as after a restart of the machine or the container
        return _is_same(content.get("start"), _start_of(content.get("process")))
    return time.time() - path.stat().st_mtime < 60 * _STALE


def _ours() -> dict:
    return {"host": socket.gethostname(), "process": os.getpid(), "start": _start_of(os.getpid())}


def _start_of(process) -> str | None:
    """Return when a process of this machine started; None where there is none of this number."""
    import psutil

    try:
        start = datetime.datetime.fromtimestamp(psutil.Process(process).create_time()).astimezone()
    except (psutil.Error, TypeError, ValueError, OverflowError):
        return None
    return start.isoformat(timespec="seconds")


def _is_same(start, other) -> bool:
    """Tell whether two starts are one: in any time zone, and with the clock set by less than a minute since."""
    try:
        return abs(datetime.datetime.fromisoformat(start) - datetime.datetime.fromisoformat(other)).total_seconds() < 60
    except (TypeError, ValueError):
        return False


def _content(path: Path) -> dict:
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


def _parsed(raw: bytes) -> dict:
    try:
        content = json.loads(raw)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _holder(content: dict) -> str:
    return f"process {content.get('process')} on {content.get('host')}, started {content.get('start')}"


def _refusal(path: Path, folder: str | Path) -> ConfigError:
    content = _content(path)
    who = _holder(content) if content else "a process that has just started"
    return ConfigError(
        f"output_dir is {folder}, which another run is writing to: {who}. Wait for its end, or choose another "
        f"output_dir. If that run is gone, delete {Path(folder) / NAME}."
    )
