"""Where `posttrain` keeps and finds files: the user's cache, and the recipes and configs that ship with it."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """Return the folder for converted models and cached reference log-probabilities.

    `POSTTRAIN_CACHE` if set, else `$XDG_CACHE_HOME/posttrain`, else `~/.cache/posttrain`. It need not exist yet.
    """
    if os.environ.get("POSTTRAIN_CACHE"):
        return Path(os.environ["POSTTRAIN_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain"


def recipes_dir() -> Path:
    """Return the folder of recipe scripts: inside the package in a wheel, at the top of a checkout."""
    return _shipped("recipes")


def configs_dir() -> Path:
    """Return the folder of YAML configs: inside the package in a wheel, at the top of a checkout."""
    return _shipped("configs")


def _shipped(name: str) -> Path:
    for folder in (_PACKAGE / f"_{name}", _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"The {name} of posttrain are missing from {_PACKAGE}; reinstall the package.")
