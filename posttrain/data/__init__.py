"""Data: reading it, making it, checking it before the model loads, and corrupting it on purpose."""

import importlib

_READERS = {
    "load_demonstrations": "posttrain.data.tasks.loading",
    "load_preferences": "posttrain.data.pairs.loading",
    "load_scored": "posttrain.data.scored.loading",
}
__all__ = list(_READERS)


def __getattr__(name: str):
    if name not in _READERS:
        raise AttributeError(f"module 'posttrain.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_READERS[name]), name)
