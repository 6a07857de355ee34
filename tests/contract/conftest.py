from collections.abc import Mapping

import pytest

from tests.families import METHODS


def _names(table):
    return table if isinstance(table, Mapping) else range(len(table))


def cases(table, core: int = 1):
    """Parameters (method, name) of a table of every method; the first `core` of each are core tests."""
    return [
        pytest.param(method, name, id=f"{method.name}-{name}", marks=[pytest.mark.slow] if place >= core else [])
        for method in METHODS.values()
        for place, name in enumerate(_names(getattr(method, table)))
    ]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
