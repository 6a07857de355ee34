"""Names of models and data sets: what reads as a path of this machine, and why one could not be loaded."""

import os
import re
from pathlib import Path

from posttrain.checks import near
from posttrain.errors import ConfigError, EnvironmentIssue, PosttrainError

_TOKENIZER = "tokenizer_config.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def reads_as_path(name: str) -> bool:
    """Tell whether a name can only be a path of this machine: it is no hub id, which is NAME or OWNER/NAME."""
    return not _HUB_ID.fullmatch(name) or ".." in name


def out_of_reach(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it came from, says that the hub could not be reached or would not answer
    now.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, ConnectionError | LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        # by its name: which package the client takes its transport from differs between its releases
        if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):
            return True
        status = getattr(error.response, "status_code", 0) if isinstance(error, HfHubHTTPError) else 0
        if status == 429 or status >= 500:
            return True
        error = error.__cause__ or error.__context__
    return False


def offline_reason() -> str:
    """Tell why the hub may be out of reach, in a sentence."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set: unset it"
    return "Mend the connection"


def check_model_name(name: str) -> None:
    """Raise ConfigError for a model name that is a file, or that can only be a folder, and is none."""
    path = Path(name).expanduser()
    if path.is_file():
        raise ConfigError(f"model {name!r} is a file; give the folder that holds it and its config.json.")
    if not reads_as_path(name) or path.is_dir():
        return
    parent, hint = path.parent, ""
    there = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
    close = near(path.name, there)
    if close:
        hint = f" Did you mean {parent / close}?"
    raise ConfigError(f"model {name!r} is a folder that does not exist (working folder: {Path.cwd()}).{hint}")


def model_failure(
    name: str, error: Exception, what: str = "cannot be loaded", of_tokenizer: bool = False
) -> PosttrainError:
    """Return the error to raise where a model, or a part of it, could not be loaded under `name` for `error`.

    EnvironmentIssue where the hub cannot be reached, ConfigError where the name, or the folder, is wrong.
    """
    if not Path(name).exists() and out_of_reach(error):
        return EnvironmentIssue(
            f"model {name!r} is no folder here and not in the cache, and the hub cannot be reached. "
            f"{offline_reason()}, or give a local folder."
        )
    there = {own for own in ("adapter_config.json", "config.json", _TOKENIZER) if (Path(name) / own).is_file()}
    # of a tokenizer beside an adapter it is another fault
    if there == {"adapter_config.json"} or there == {"adapter_config.json", _TOKENIZER} and not of_tokenizer:
        return ConfigError(
            f"model {name!r} holds an adapter, not a model. Give its base model, or merge the two first: "
            f"posttrain merge {name} FOLDER."
        )
    reason = str(error).strip().split("\n")[0]
    return ConfigError(
        f"model {name!r} {what}: {reason} Give a folder with a config.json, or a model id of the hub that this machine "
        "can reach or has in its cache."
    )
