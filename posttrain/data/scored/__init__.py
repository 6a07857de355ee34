"""Scored answers: reading and scoring them, their scales, baselines and tokens."""

import importlib

# what reads and scores them is had from here
_READERS = ("as_scored", "load_scored", "score", "unroll")


def __getattr__(name: str):
    if name not in _READERS:
        raise AttributeError(f"module 'posttrain.data.scored' has no attribute {name!r}")
    return getattr(importlib.import_module("posttrain.data.scored.loading"), name)
