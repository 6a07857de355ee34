"""Reading preference pairs: a hub data set, a local file, or generated ones."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from posttrain.data import formats, generators, objects, shapes, turns
from posttrain.data.columns import READ, SYSTEM, log_left_out_columns, place_system
from posttrain.data.parquet import read_parquet
from posttrain.data.sources import (
    SUFFIXES,
    is_file_name,
    json_rows,
    kind_of,
    load_hub,
    mixed_types,
    refuse_hub_settings,
)
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger

COLUMNS = ("prompt", "chosen", "rejected", "flip_rate", "tools", "chat_template_kwargs")


def load_preferences(
    source: str,
    split: str = "train",
    limit: int | None = None,
    convert: bool = True,
    beside: tuple[str, ...] = (),
    **given,
):
    """Load preference pairs as a `datasets.Dataset` with the columns of `COLUMNS` that the source has.

    `source` is one of
    - a local file: .json (a list of rows), .jsonl, .jsonl.gz or .parquet, whatever the `split`;
    - `generated:reverse_list`, with options as in `generated:reverse_list?n=256&seed=0`; any split but `train` gives
      pairs that are disjoint from the training ones;
    - a hub data set's id, or a folder that `datasets.load_dataset` reads or `save_to_disk` wrote.

    Every row needs `chosen` and `rejected`, texts or lists of messages; `prompt` may be missing where both
    sides begin with it, as TRL allows. `flip_rate` is optional, the other kept columns are TRL's. `limit`:
    the first rows only. `beside`: other columns that are kept where the source has them, as they are. `given`: `name`,
    `data_dir`, `data_files` of `datasets.load_dataset`, for hub data sets.

    alpaca and sharegpt rows with both sides are converted to messages, and so are those of `posttrain.data.shapes`
    (UltraFeedback, HH-RLHF and others) unless `convert` is False, which is said. A column `system` is put in front of
    the messages.

    Raises DataError for a missing file, an unknown kind of file, broken JSON (with the line), missing columns
    and empty data; EnvironmentIssue where the hub cannot be reached.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be at least 1, or left out for all rows.")
    refuse_hub_settings(source, given)
    read, places = (*COLUMNS, *(name for name in beside if name not in COLUMNS)), []
    if generators.is_made(source):
        dataset = generators.make(source, split, generators.PAIRS)
    elif is_file_name(source):
        dataset, places = _read_file(Path(source).expanduser(), limit, convert, read)
    else:
        dataset = _converted(turns.read(load_hub(source, split, **given), source), source, convert)
    if not {"chosen", "rejected"} <= set(dataset.column_names):
        raise formats.without_sides(dataset.column_names, source, dataset[0] if len(dataset) else None)
    if len(dataset) == 0:
        raise DataError(f"{source} (split {split!r}) holds no rows.")
    found = formats.detect(dataset.column_names, dataset[0])
    if found.kind in formats.CONVERTED_PAIRS:
        get_logger().info("%s: %s rows (%s), converted to messages", source, found, found.why)
        dataset = formats.convert(dataset, places or [f"{source}, row {row}" for row in range(1, len(dataset) + 1)])
    names = dataset.column_names
    kept = dict.fromkeys((*read, *SYSTEM))
    dataset = objects.restored(dataset.select_columns([name for name in kept if name in names]))
    log_left_out_columns(names, read, source)
    dataset = place_system(dataset, source)
    dataset = dataset.select_columns([name for name in read if name in names])
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _converted(dataset, source: str, convert: bool):
    """Convert a data set of a known shape to pairs; others as they are."""
    known = convert and len(dataset) and shapes.find(dataset.column_names, dataset[0], (shapes.PAIRS,), source)
    return shapes.convert(dataset, source) if known else dataset


def _read_file(path: Path, limit: int | None, convert: bool, read: tuple[str, ...]):
    """Return the rows of a file, and where each one is; no places where that is its number."""
    from datasets.exceptions import DatasetGenerationError

    if not path.exists():
        raise DataError(f"{path} does not exist (working folder: {Path.cwd()}).")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path} is of an unknown kind; readable are {', '.join(SUFFIXES)}.")
    if path.suffix == ".parquet":
        return _read_parquet(path, convert, read), []
    rows, places = [], []
    found = _as_messages(json_rows(path), limit, str(path))
    for place, row in shapes.read(found, (shapes.PAIRS,), str(path)) if convert else found:
        rows.append(_checked(row, place, is_first=not rows))
        places.append(place)
        if len(rows) == limit:
            break
    if not rows:
        raise DataError(f"{path} holds no rows.")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = _columns_to_read(set(names), rows[0], read)
    log_left_out_columns(names, columns, str(path))
    if "prompt" in columns:
        for place, row in zip(places, rows, strict=True):
            if row.get("prompt") is None:
                problem = "is null" if "prompt" in row else "is missing, though other rows have it"
                raise DataError(f"{place}: 'prompt' {problem}; fill it in, or leave the row out.")
    rows = [{name: row.get(name) for name in columns} for row in rows]
    try:
        return objects.exact(rows, columns, places), places
    except (TypeError, ValueError, OverflowError, DatasetGenerationError) as error:
        # pyarrow's own errors are ValueErrors or TypeErrors.
        raise mixed_types(rows, places, path, error) from None


def _as_messages(found: Iterator[tuple[str, object]], limit: int | None, name: str):
    """Read rows with their places as `turns.Turns` reads them, told by the first `limit`."""
    first = list(itertools.islice(found, limit))
    places, rows = [place for place, _ in first], [row for _, row in first]
    read = turns.Turns(rows, places, name)
    try:
        for place, row in itertools.chain(first, found):
            yield place, {**row, **read.changed(row, place)} if isinstance(row, dict) else row
    finally:
        read.say()


def _columns_to_read(names: set[str], row: dict, read: tuple[str, ...]) -> list[str]:
    """Return the columns that are read, and of rows that are yet to be converted those that this takes."""
    wanted = tuple(dict.fromkeys((*read, *SYSTEM)))
    if formats.detect(names, row).kind in formats.CONVERTED_PAIRS:
        wanted = dict.fromkeys((*wanted, *formats.CONVERTED_COLUMNS))
    return [name for name in wanted if name in names]


def _read_parquet(path: Path, convert: bool, read: tuple[str, ...]):
    table = turns.read(read_parquet(path, (*READ, *read)), str(path))
    names, first = table.column_names, table[0] if len(table) else {}
    if convert and shapes.find(names, first, (shapes.PAIRS,), str(path)):
        return shapes.convert(table, str(path))
    if not {"chosen", "rejected"} <= set(names):
        raise formats.without_sides(names, path, first or None)
    columns = _columns_to_read(set(names), first, read)
    log_left_out_columns(names, columns, str(path))
    return table.select_columns(columns)


def _checked(row, place: str, is_first: bool) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be an object with 'chosen' and 'rejected', not {kind_of(row)}.")
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing and is_first:
        raise formats.without_sides(row, place, row)
    if missing:
        raise DataError(
            f"{place}: {' and '.join(map(repr, missing))} missing, though other rows have both sides; found "
            f"{list(row)}. Fill it in, or leave the row out."
        )
    null = [name for name in ("chosen", "rejected") if row[name] is None]
    if null:
        what = f"{null[0]!r} is null" if len(null) == 1 else "'chosen' and 'rejected' are null"
        raise DataError(f"{place}: {what}; every row needs both sides. Fill it in, or leave the row out.")
    return row
