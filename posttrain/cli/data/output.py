"""The file that a verb of `posttrain data` writes."""

import contextlib
import gzip
import json
import os
import tempfile
from pathlib import Path

from posttrain.errors import ConfigError, EnvironmentIssue

OUT_SUFFIXES = (".jsonl", ".jsonl.gz")


def output_file(args) -> Path:
    """Return the file to write; ConfigError for one of another kind, or that is there already."""
    out = Path(args.out).expanduser()
    if not out.name.endswith(OUT_SUFFIXES):
        raise ConfigError(f"OUT is {args.out}; its name must end in {' or '.join(OUT_SUFFIXES)}.")
    if out.is_dir() or (out.exists() and not args.force):
        raise ConfigError(f"{out} exists already. Name another file" + ("." if out.is_dir() else ", or add --force."))
    return out


def write_lines(path: Path, rows) -> None:
    """Write a JSON line per row, all of them or no file; equal rows give equal bytes."""
    # where links go round in a circle, the path as it is
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as raw:
            # without the name and time that gzip would write
            packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else contextlib.nullcontext(raw)
            with packed as file:
                for row in rows:
                    file.write(_line(row))
            raw.flush()
            os.fsync(raw.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        raise EnvironmentIssue(
            f"{path} cannot be written ({error.strerror or error}); nothing was left there."
        ) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _line(row: dict) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        return json.dumps(row).encode() + b"\n"
