"""Settings of a Flower run, as an app's pyproject.toml and `flwr run --run-config` give them, read as ours are."""

from collections.abc import Mapping
from dataclasses import fields

from posttrain.checks import near, shorten
from posttrain.errors import ConfigError
from posttrain.federated.config import FederatedConfig
from posttrain.visible import one_line

# of a table in pyproject.toml, whose keys Flower writes so
PREFIX = "federated."
# what runs in one process need: splits, and clients that fail on purpose
_OF_LOOPS = ("partition", "partition_column", "dirichlet_alpha", "min_client_rows", "num_clients", "dropout")


def federated_config(settings: Mapping) -> FederatedConfig:
    """Return the settings of the rounds: those of the table `[tool.flwr.app.config.federated]`.

    Rows are split already, each client having its own.

    Args:
        settings: of the run, `context.run_config`.

    Raises:
        ConfigError: an unknown setting, one of runs in one process, or a value that is out of range.
    """
    known = [field.name for field in fields(FederatedConfig) if field.name not in _OF_LOOPS]
    given = {}
    for key, value in settings.items():
        if not key.startswith(PREFIX):
            continue
        name = key.removeprefix(PREFIX).replace("-", "_")
        if name in _OF_LOOPS:
            raise ConfigError(
                f"{one_line(key)} is set, and is of runs in one process; clients of Flower have rows of their own, and "
                "fail by themselves. Leave it out."
            )
        if name not in known:
            close = near(name, known)
            hint = f" Did you mean {PREFIX}{close}?" if close else ""
            raise ConfigError(f"there is no setting {one_line(key)}.{hint}")
        given[name] = value
    return FederatedConfig(partition="given", **given)


def listed_in(settings: Mapping, name: str) -> list[str]:
    """Return the texts of a setting that has several, with commas between them.

    Raises:
        ConfigError: it is missing or empty.
    """
    value = settings.get(name)
    found = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else []
    if not found:
        raise ConfigError(f'{name} is {shorten(value)}; it must be texts with commas between them, such as "a,b".')
    return found
