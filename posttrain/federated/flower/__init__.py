"""Federated LoRA on Flower: FedSVD around any strategy, a client app of our trainers, a grid in one process.

The names below need the extra `flower`. They are imported when first used; the modules that need no Flower, such as
`wire`, are there without it.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

from posttrain.errors import EnvironmentIssue, require

_MODULES = {
    "FedSVD": "strategy",
    "Node": "client",
    "client_app": "client",
    "InProcessGrid": "in_process",
    "run_in_process": "in_process",
    "SecureFedSVD": "secure",
    "secure_client_app": "secure",
}
__all__ = list(_MODULES)
# what the tests ran on; others have other messages and other private names
_TESTED = "1.42."


def check_flower() -> None:
    """Raise EnvironmentIssue where Flower is missing, or is of another release than the tests ran on."""
    require("flwr", "flower", "federated training on Flower")
    try:
        found = version("flwr")
    except PackageNotFoundError:
        found = "unknown"
    if not found.startswith(_TESTED):
        raise EnvironmentIssue(
            f"flwr is {found}; federated training on Flower was made for {_TESTED}x: "
            'pip install "posttrain[flower]" in an environment of its own.'
        )


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_flower()
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
