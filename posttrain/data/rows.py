"""Reading rows of any kind, with every column and the place of each row."""

import json
from collections.abc import Iterable
from pathlib import Path

from posttrain.data import formats, objects
from posttrain.data.columns import READ
from posttrain.data.pairs import loading
from posttrain.data.parquet import read_parquet
from posttrain.errors import DataError


def read_rows(source: str, split: str = "train", limit: int | None = None) -> tuple[list[dict], list[str]]:
    """The rows of a source as plain objects, and the words that say where each one is.

    `source`: what `load_preferences` takes: a local .json, .jsonl, .jsonl.gz or .parquet file, a hub id, or a generated
    data set. `limit`: the first rows only.

    Raises DataError for a missing file, an unknown kind of file, broken JSON (with the line), rows that are no objects
    and empty data; EnvironmentIssue where the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if not source.startswith("generated:") and loading._is_file_name(source):
        if not path.exists():
            raise DataError(f"{path} does not exist (working folder: {Path.cwd()}).")
        if not path.name.endswith(loading.SUFFIXES):
            raise DataError(f"{path} is of an unknown kind; readable are {', '.join(loading.SUFFIXES)}.")
        found = _parquet_rows(path) if path.suffix == ".parquet" else loading._json_rows(path)
    else:
        load = loading._generate if source.startswith("generated:") else loading._load_hub
        found = objects.unpadded(load(source, split))
        found = ((f"{source}, row {number}", row) for number, row in enumerate(found, 1))
    rows, places = [], []
    for place, row in found:
        if not isinstance(row, dict):
            raise DataError(f"{place}: a row must be an object, not {loading._kind(row)}.")
        rows.append(row)
        places.append(place)
        if len(rows) == limit:
            break
    if not rows:
        raise DataError(f"{source} holds no rows.")
    return rows, places


def columns_of(rows: Iterable[dict]) -> list[str]:
    """The names that any row has, in the order in which they come up."""
    return list(dict.fromkeys(name for row in rows for name in row))


def as_dataset(rows: list[dict], source: str):
    """A `datasets.Dataset` of the columns that some kind of data set has; null where a row lacks one.

    Nested values are kept as the rows have them.

    Raises DataError where a column's values have no common type.
    """
    from datasets.exceptions import DatasetGenerationError

    names = [name for name in columns_of(rows) if name in formats.KNOWN_COLUMNS]
    rows = [{name: row.get(name) for name in names} for row in rows]
    try:
        return objects.exact(rows, names)
    except (TypeError, ValueError, OverflowError, DatasetGenerationError) as error:
        # pyarrow's own errors are ValueErrors or TypeErrors
        places = [f"{source}, row {number}" for number in range(1, len(rows) + 1)]
        raise loading.mixed_types(rows, places, source, error) from None


def cells(rows: list[dict], places: list[str]):
    """A `datasets.Dataset` of the same rows with every value as JSON text, and null where a row lacks the column.

    Whatever the values are, they come out of `rows_of` as they went in. A bool column `flipped` stays one. Raises
    DataError for a value that JSON cannot hold, with one of the `places`.
    """
    from datasets import Dataset

    names = columns_of(rows)
    columns: dict[str, list] = {name: [] for name in names}
    for place, row in zip(places, rows, strict=True):
        for name in names:
            try:
                columns[name].append(json.dumps(row[name], allow_nan=False) if name in row else None)
            except (TypeError, ValueError) as error:
                raise DataError(f"{place}, column {name!r} holds a value that JSON cannot: {error}.") from None
    if "flipped" in columns:
        columns["flipped"] = [bool(row.get("flipped")) for row in rows]
    return Dataset.from_dict(columns)


def rows_of(dataset) -> Iterable[dict]:
    """The rows of a data set that `cells` made."""
    for row in dataset:
        there = {name: value for name, value in row.items() if value is not None}
        yield {name: value if name == "flipped" else json.loads(value) for name, value in there.items()}


def _parquet_rows(path: Path):
    for number, row in enumerate(objects.unpadded(read_parquet(path, READ)), 1):
        yield f"{path}, row {number}", row
