"""The small files that say whose a folder is: markers of checkpoints, notes of saves and of run folders.

Anyone may have changed one, so each is read here alone, and holds what its form says or counts as damaged.
"""

import json
import math
import os
from pathlib import Path

from posttrain.errors import ConfigError, DataError, PosttrainError
from posttrain.private import without_secrets
from posttrain.saved import read_json
from posttrain.whole_files import sync

MARKER = "posttrain_complete.json"
# there from the first to the last byte of a save, or of a removal
SAVING = "posttrain_saving.json"
# In the run folder: whose model lies there, and of which files it consists.
NOTE = "posttrain_run.json"


def partial_name(name: str) -> str:
    """Return the name that a file has until it is whole."""
    return f".{name}.partial"


def mark(folder: Path, content: dict, name: str = MARKER) -> None:
    """Write a marker or note at once, so that it is never half there, also when the machine stops.

    Secrets are left out. A state that would not come back whole is a fault of its method, and raises PosttrainError.
    """
    text, partial = json.dumps(without_secrets(content), indent=1) + "\n", folder / partial_name(name)
    if "state" in content and json.dumps(json.loads(text)["state"]) != json.dumps(content["state"]):
        raise PosttrainError(
            "the state of the run has something under a name that stands for a secret, which no checkpoint keeps, so "
            "that the run could not go on from it. Give it another name in method_state."
        )
    with open(partial, "w", opener=_unfollowed) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / name)
    sync(folder)


def content_of(path: Path) -> dict:
    """Read a marker or a note: its identity, and update, files, digests and state where it has them.

    Raises:
        ConfigError: it is damaged: no JSON, or of another form than a run writes.
    """
    try:
        content = read_json(path)
    except DataError:
        content = {}
    if not _has_form(content, files_are_listed=path.name == NOTE):
        raise damaged(path)
    return content


def damaged(path: Path) -> ConfigError:
    """Return the error of a marker or note that is not as it was written."""
    return ConfigError(f"{path} is damaged, so nothing says what run wrote {path.parent}. Delete that folder.")


def _has_form(content: dict, files_are_listed: bool) -> bool:
    files, digests, state = content.get("files", {}), content.get("digests", {}), content.get("state", {})
    if not all(isinstance(part, dict) for part in (content.get("identity"), content.get("update", {}), digests, state)):
        return False
    if files_are_listed:
        are_files = isinstance(files, dict | list) and all(isinstance(name, str) for name in files)
    else:
        are_files = isinstance(files, dict) and all(type(size) is int for size in files.values())
    return are_files and all(isinstance(digest, str) for digest in digests.values()) and _is_state(state)


def _is_state(state: dict) -> bool:
    schedule = state.get("schedule") or {"total": 1, "knots": []}
    if not (is_number(state.get("num_tokens", 0)) and isinstance(state.get("method") or {}, dict)):
        return False
    if not isinstance(schedule, dict) or type(schedule.get("total")) is not int or schedule["total"] < 1:
        return False
    knots = schedule.get("knots")
    return isinstance(knots, list) and all(
        isinstance(knot, list) and len(knot) == 2 and all(is_number(value) for value in knot) for knot in knots
    )


def is_number(value) -> bool:
    """Tell whether a value of JSON is a finite number of zero or more."""
    return type(value) in (int, float) and 0 <= value < math.inf


def _unfollowed(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
