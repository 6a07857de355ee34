"""A pytest plugin: local data in the place of the hub's, our trainers in the place of TRL's, results into a file.

What it does is in environment variables: PEER_DATA (JSON, folders by the hub's names), PEER_SWAP (JSON, our classes by
TRL's names; empty for none) and PEER_RESULTS (the file, a JSON line a test).
"""

import importlib
import importlib.util
import json
import os

import datasets

_load_dataset = datasets.load_dataset
_data = json.loads(os.environ["PEER_DATA"])


def _local(path, *args, **kwargs):
    return _load_dataset(_data.get(path, path), *args, **kwargs)


def _is_available(name: str):
    """Of a checkout older or younger than the installed TRL, which may ask for packages that it does not know."""
    if not (name.startswith("is_") and name.endswith("_available")):
        raise AttributeError(name)
    return lambda *args: importlib.util.find_spec(name[3:-10]) is not None


datasets.load_dataset = _local
importlib.import_module("trl.import_utils").__getattr__ = _is_available


def pytest_collection_modifyitems(items):
    """Our classes under TRL's names in the test modules alone: our own code builds on TRL's."""
    for theirs, ours in json.loads(os.environ["PEER_SWAP"]).items():
        module, _, name = ours.partition(":")
        kind = getattr(importlib.import_module(module), name)
        for test in {item.module for item in items}:
            setattr(test, theirs, kind)


def pytest_runtest_logreport(report):
    if report.when == "call" or (report.when == "setup" and not report.passed):
        result = {"test": report.nodeid.split("::", 1)[1], "outcome": report.outcome, "seconds": report.duration}
        if report.failed:
            result["reason"] = _reason(report)
        elif report.skipped and isinstance(report.longrepr, tuple):
            result["reason"] = report.longrepr[2]
        with open(os.environ["PEER_RESULTS"], "a") as file:
            file.write(json.dumps(result) + "\n")


def _reason(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return " ".join(text.split())[:300]
