"""What a federated run is given, looked at before a client trains: the start, the clients, functions, a folder."""

import json
import math
import os
from collections.abc import Mapping

from posttrain.checks import is_beyond_floats, plain, shorten
from posttrain.errors import ConfigError, DataError
from posttrain.federated.config import FederatedConfig
from posttrain.federated.methods import Shared
from posttrain.objectives import factors
from posttrain.visible import one_line


def check_loop(start, rows, train, config, folder, evaluate, identity) -> None:
    """Raise for what no `FederatedLoop` can run with: ConfigError, and DataError for factors that are not finite."""
    _check_config(config)
    _check_start(start)
    if not isinstance(rows, Mapping) or not all(isinstance(name, str) and name for name in rows):
        raise ConfigError(f"rows is {one_line(shorten(rows))}; it must be numbers of rows by the client's id, a text.")
    for name, count in rows.items():
        held = plain(count)
        if isinstance(held, bool) or not isinstance(held, int) or held < 1 or is_beyond_floats(held):
            raise ConfigError(
                f"rows of client {one_line(name)} is {shorten(count)}; it must be a whole number of 1 or more."
            )
    for name, function in (("train", train), ("evaluate", evaluate)):
        if not callable(function) and not (name == "evaluate" and function is None):
            raise ConfigError(f"{name} is {shorten(function)}; it must be a function.")
    if folder is not None and not (isinstance(folder, str | os.PathLike) and os.fspath(folder)):
        raise ConfigError(f"folder is {shorten(folder)}; it must be a path, or None to keep nothing.")
    if identity is not None:
        try:
            is_plain = isinstance(identity, Mapping) and json.loads(json.dumps(identity, allow_nan=False)) == identity
        except (TypeError, ValueError, RecursionError):
            is_plain = False
        if not is_plain:
            raise ConfigError(
                f"identity is {shorten(identity)}; it must be plain JSON by name: texts, whole numbers, lists of them."
            )


def check_clients(rows, build, config, ledgers=None) -> None:
    """Raise ConfigError for what no `TrainerClients` can be made of; its model is looked at where its LoRA is read."""
    _check_config(config)
    if not isinstance(rows, Mapping) or not rows or not all(isinstance(name, str) and name for name in rows):
        raise ConfigError(
            f"rows is {one_line(shorten(rows))}; it must be data sets by the client's id, a text, as `split` "
            "gives them."
        )
    for name, held in rows.items():
        if not hasattr(held, "column_names") or not hasattr(held, "__len__"):
            raise ConfigError(
                f"rows of client {one_line(name)} is {type(held).__name__}; it must be a datasets.Dataset, whose rows "
                "can be counted."
            )
    if not callable(build):
        raise ConfigError(f"build is {shorten(build)}; it must be a function `build(model, rows, seed)`.")
    if ledgers is not None and not (isinstance(ledgers, str | os.PathLike) and os.fspath(ledgers)):
        raise ConfigError(
            f"ledgers is {shorten(ledgers)}; it must be the path of a folder, or None for a temporary one."
        )


def processes() -> int:
    """Return the number of processes that the environment tells of; ConfigError where it tells none."""
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdecimal():
        raise ConfigError(f"WORLD_SIZE is {told!r}; it must be a number of processes. Leave it out of the environment.")
    return int(told)


def numbers_of(evaluation) -> dict[str, float | None]:
    """Return what an evaluation tells as plain numbers by name, None for one that is not finite.

    Raises ConfigError for what is no numbers by name.
    """
    if not isinstance(evaluation, Mapping):
        raise ConfigError(f"evaluate returned {shorten(evaluation)}; it must return numbers by name.")
    made = {}
    for name, value in evaluation.items():
        number = plain(value)
        if not isinstance(name, str) or not isinstance(number, bool | int | float):
            raise ConfigError(
                f"evaluate returned {shorten(value)} for {shorten(name)}; it must return numbers by name."
            )
        made[name] = None if is_beyond_floats(number) or not math.isfinite(number) else number
    return made


def _check_config(config) -> None:
    if not isinstance(config, FederatedConfig):
        raise ConfigError(f"config is {shorten(config)}; it must be a FederatedConfig.")


def _check_start(start) -> None:
    if not isinstance(start, Shared) or not all(isinstance(part, Mapping) for part in start):
        raise ConfigError(f"start is a {type(start).__name__}; it must be a Shared, such as `TrainerClients.start`.")
    if not start.B or start.A.keys() != start.B.keys() or not start.base.keys() <= start.B.keys():
        raise ConfigError(
            f"start has A of {shorten(sorted(map(str, start.A)))}, B of {shorten(sorted(map(str, start.B)))} and a "
            f"change of the base of {shorten(sorted(map(str, start.base)))}; A and B must be of the same modules, of "
            "one or more, and no others may have a change."
        )
    for name in start.B:
        pairs = [(start.A[name], start.B[name]), *([start.base[name]] if name in start.base else [])]
        for a, b in pairs:
            try:
                factors.check(a, b)
            except (ConfigError, DataError) as error:
                raise type(error)(f"start, {one_line(str(name))}: {error}") from None
