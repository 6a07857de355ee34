"""Reading rows of any kind, with every column and the place of each row."""

import json
from collections.abc import Iterable, Mapping

from posttrain.data import formats, objects, sources
from posttrain.errors import DataError

# reading them is had from here as well
read_rows = sources.read_rows


def columns_of(rows: Iterable[dict]) -> list[str]:
    """Return the names that any row has, in the order in which they come up."""
    return list(dict.fromkeys(name for row in rows for name in row))


def as_dataset(rows: list[dict], source: str):
    """Make a `datasets.Dataset` of the columns that some kind of data set has; null where a row lacks one.

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
        raise sources.mixed_types(rows, places, source, error) from None


def cells(rows: list[dict], places: list[str]):
    """Make a `datasets.Dataset` of the same rows with every value as JSON text, and null where a row lacks the
    column.

    Whatever the values are, they come out of `rows_of` as they went in. A bool column `flipped` stays one. Raises
    DataError for a value that JSON cannot hold, with one of the `places`.
    """
    from datasets import Dataset

    names = columns_of(rows)
    for place, row in zip(places, rows, strict=True):
        if half := sources.half_characters([dict.fromkeys(row)], [place]):
            raise half
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
    """Return the rows of a data set that `cells` made."""
    for row in dataset:
        there = {name: value for name, value in row.items() if value is not None}
        yield {name: value if name == "flipped" else json.loads(value) for name, value in there.items()}


def refuse_splits(train_dataset) -> None:
    """Raise DataError for several data sets by name in the place of the one to train on."""
    if isinstance(train_dataset, Mapping):
        splits = ", ".join(map(str, train_dataset))
        raise DataError(f"train_dataset is a {type(train_dataset).__name__}; give one of its splits: {splits}.")


def by_name(eval_dataset) -> dict:
    """Name the data sets of no, one or several by their names."""
    if eval_dataset is None:
        return {}
    return dict(eval_dataset) if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}


def as_given(given, named: dict):
    """Undo `by_name`: the single data set, or the dict, as the caller passed it."""
    if given is None:
        return None
    return named if isinstance(given, Mapping) else named["eval_dataset"]
