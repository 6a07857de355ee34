"""Rows split over the clients of a federated run: at random, unevenly by a column, or as they are given."""

import math
from collections.abc import Hashable, Mapping, Sequence

from posttrain.checks import near, plain, shorten
from posttrain.data import objects
from posttrain.errors import ConfigError, DataError
from posttrain.federated.config import FederatedConfig
from posttrain.federated.seeds import rng
from posttrain.visible import listed, one_line

# of names of clients that a message lists
_SHOWN = 5


def split(train_dataset, config: FederatedConfig) -> dict:
    """Split rows over clients as the settings say; every row goes to one client, and the same ones for a seed.

    Args:
        train_dataset: a `datasets.Dataset`; for `partition: given` without a column, data sets by the client's name.

    Returns:
        the rows of each client by its name, in the order of the names, which is that of every average.

    Raises:
        ConfigError: settings that do not fit the clients that there are.
        DataError: a stream, a column that is missing or has values of no use, clients with too few rows.
    """
    is_mapping = isinstance(train_dataset, Mapping)
    if is_mapping != (config.partition == "given" and config.partition_column is None):
        raise DataError(_other_form(train_dataset, config, is_mapping))
    if is_mapping:
        clients = {_named(name): _sized(rows, f"the data set of client {name}") for name, rows in train_dataset.items()}
        return _checked(clients, config)
    rows = _sized(train_dataset, "train_dataset")
    if config.partition == "iid":
        places = iid(len(rows), config.num_clients, config.federated_seed)
    else:
        values = column_of(rows, config.partition_column)
        if config.partition == "given":
            places = by_value(values)
        else:
            places = dirichlet(values, config.num_clients, config.dirichlet_alpha, config.federated_seed)
    _check_sizes({name: len(held) for name, held in places.items()}, config)
    return _checked({name: rows.select(held) for name, held in places.items()}, config)


def iid(rows: int, clients: int, seed: int) -> dict[str, list[int]]:
    """Split row numbers at random into parts whose sizes differ by one at most, each in the rows' own order.

    Raises DataError for fewer rows than clients.
    """
    if rows < clients:
        raise DataError(f"num_clients is {clients}, and there are {rows} rows, so that some client has none.")
    numbers = list(range(rows))
    rng(seed, "iid").shuffle(numbers)
    ends = [rows * place // clients for place in range(clients + 1)]
    parts = zip(names(clients), ends, ends[1:], strict=False)
    return {name: sorted(numbers[start:end]) for name, start, end in parts}


def dirichlet(values: Sequence[Hashable], clients: int, alpha: float, seed: int) -> dict[str, list[int]]:
    """Split the rows of each value over the clients by shares that are drawn from Dirichlet(alpha, ..., alpha).

    Each value draws by a generator of its own, so that more values leave the others' rows where they are. Ends of parts
    are rounded, and no row is left out.

    Args:
        values: of each row. alpha: above 0.

    Raises DataError for fewer rows than clients; a client may well have none.

    Source: arXiv 1909.06335, with a share of each value in the place of a mixture for each client.
    """
    if len(values) < clients:
        raise DataError(f"num_clients is {clients}, and there are {len(values)} rows, so that some client has none.")
    held: dict[str, list[int]] = {name: [] for name in names(clients)}
    for value, numbers in by_value(values, as_names=False).items():
        draw = rng(seed, "dirichlet", type(value).__name__, value)
        draw.shuffle(numbers)
        start, so_far = 0, 0.0
        for place, (name, share) in enumerate(zip(held, _shares(draw, clients, alpha), strict=True)):
            so_far += share
            end = len(numbers) if place == clients - 1 else min(round(so_far * len(numbers)), len(numbers))
            held[name] += numbers[start:end]
            start = end
    return {name: sorted(numbers) for name, numbers in held.items()}


def by_value(values: Sequence[Hashable], as_names: bool = True) -> dict:
    """Return the row numbers of each value, in the order of the values, by the value or its text, a client's name."""
    found: dict[Hashable, list[int]] = {}
    for number, value in enumerate(values):
        # True and 1 are equal keys
        found.setdefault((type(value).__name__, value), []).append(number)
    if not as_names:
        return {value: found[kind, value] for kind, value in sorted(found)}
    return dict(sorted((_named(str(value)), numbers) for (_, value), numbers in found.items()))


def column_of(rows, column: str) -> list[Hashable]:
    """Return the values of a column, each a text, a whole number or a boolean, all of one kind.

    Raises DataError where it is missing, or a row has something else in it.
    """
    found = objects.names_of(rows)
    if column not in found:
        close = near(column, found)
        raise DataError(
            f"train_dataset has no column {one_line(column)}, which partition_column names. Found: {listed(found)}."
            + (f" Did you mean {one_line(close)}?" if close else "")
        )
    values = [plain(value) for value in rows.with_format(None)[column][:]]
    kind = type(values[0]) if values else str
    for number, value in enumerate(values, 1):
        if not isinstance(value, str | int):
            raise DataError(
                f"train_dataset, row {number}: {one_line(column)} is {shorten(value)}; partition_column takes a column "
                "of texts, whole numbers or booleans, with a value in each row."
            )
        if type(value) is not kind:
            raise DataError(
                f"train_dataset, row {number}: {one_line(column)} is {shorten(value)}, and row 1 has "
                f"{shorten(values[0])}; partition_column takes values of one kind."
            )
    return values


def names(clients: int) -> list[str]:
    """Return the names of so many clients, whose order as texts is that of their numbers."""
    width = len(str(max(clients - 1, 0)))
    return [f"client-{number:0{width}d}" for number in range(clients)]


def _shares(draw, clients: int, alpha: float) -> list[float]:
    """Draw shares from a symmetric Dirichlet, by logarithms: for a small alpha the gammas themselves may all be 0."""
    # Gamma(alpha) is Gamma(alpha + 1) times U^(1 / alpha)
    logs = [math.log(draw.gammavariate(alpha + 1, 1.0)) + math.log(1.0 - draw.random()) / alpha for _ in range(clients)]
    parts = [math.exp(value - max(logs)) for value in logs]
    return [part / sum(parts) for part in parts]


def _sized(rows, what: str):
    if not hasattr(rows, "column_names") or not hasattr(rows, "__len__"):
        raise DataError(
            f"{one_line(what)} is {type(rows).__name__}; give a datasets.Dataset, whose rows can be counted, no stream."
        )
    return rows


def _named(name) -> str:
    if not isinstance(name, str) or not name.strip() or one_line(name) != name or len(name) > 200:
        raise DataError(f"a client's name is {shorten(name)}; it must be a text of one visible line.")
    return name


def _other_form(train_dataset, config: FederatedConfig, is_mapping: bool) -> str:
    if is_mapping:
        some = listed(list(map(str, train_dataset))[:_SHOWN])
        return (
            f"train_dataset is several data sets by name ({some}), and partition is {config.partition}"
            f"{' by a column' if config.partition == 'given' else ''}. Give one of them, or set `partition: given` "
            "without partition_column: each is then a client."
        )
    return (
        f"train_dataset is a {type(train_dataset).__name__}, and `partition: given` takes data sets by the client's "
        "name. Give a dict of them, or partition_column, whose values name the clients."
    )


def _checked(clients: dict, config: FederatedConfig) -> dict:
    if not clients:
        raise DataError("there is no client: train_dataset names no data set.")
    try:
        config.check_clients(len(clients))
    except ConfigError as error:
        raise ConfigError(f"{error} The clients are {listed(sorted(clients)[:_SHOWN])}.") from None
    _check_sizes({name: len(rows) for name, rows in clients.items()}, config)
    return dict(sorted(clients.items()))


def _check_sizes(sizes: Mapping[str, int], config: FederatedConfig) -> None:
    """Raise DataError where a client has too few rows."""
    few = {name: size for name, size in sorted(sizes.items()) if size < config.min_client_rows}
    if not few:
        return
    shown = ", ".join(f"{name} has {size}" for name, size in list(few.items())[:_SHOWN])
    more = f" and {len(few) - _SHOWN} others" if len(few) > _SHOWN else ""
    mend = {
        "iid": "Give fewer num_clients, or more rows.",
        "dirichlet": f"A larger dirichlet_alpha than {config.dirichlet_alpha}, fewer num_clients or another "
        "federated_seed gives each of them more.",
        "given": "Leave such clients out, or give them more rows.",
    }[config.partition]
    raise DataError(
        f"of {len(sizes)} clients {len(few)} have too few rows: {shown}{more}, and min_client_rows is "
        f"{config.min_client_rows}. {mend}"
    )
