"""Reading preference pairs: a hub data set, a local file, or generated ones."""

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import parse_qsl

from posttrain.data import formats, objects, shapes, turns
from posttrain.data.columns import READ, SYSTEM, place_system, say_left_out
from posttrain.data.parquet import read_parquet
from posttrain.data.procedural import reverse_list_pairs
from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.log import get_logger
from posttrain.remote import offline_reason, out_of_reach, reads_as_path

COLUMNS = ("prompt", "chosen", "rejected", "flip_rate", "tools", "chat_template_kwargs")
SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet")
_GENERATED = "generated:reverse_list"
_OTHER_SUFFIXES = (".csv", ".tsv", ".txt", ".gz", ".zip", ".zst", ".xz", ".arrow", ".yaml", ".yml", ".xlsx")


def load_preferences(source: str, split: str = "train", limit: int | None = None, convert: bool = True):
    """Preference pairs as a `datasets.Dataset` with the columns of `COLUMNS` that the source has.

    `source` is one of - a local file: .json (a list of rows), .jsonl, .jsonl.gz or .parquet, whatever the
    `split`; - `generated:reverse_list`, with options as in `generated:reverse_list?n=256&seed=0`; any split
    but `train` gives
      pairs that are disjoint from the training ones;
    - a hub data set's id, or a folder that `datasets.load_dataset` reads or `save_to_disk` wrote.

    Every row needs `chosen` and `rejected`, texts or lists of messages; `prompt` may be missing where both
    sides begin with it, as TRL allows. `flip_rate` is optional, the other kept columns are TRL's. `limit`:
    the first rows only.

    alpaca and sharegpt rows with both sides are converted to messages, and so are those of `posttrain.data.shapes`
    (UltraFeedback, HH-RLHF and others) unless `convert` is False, which is said. A column `system` is put in front of
    the messages.

    Raises DataError for a missing file, an unknown kind of file, broken JSON (with the line), missing columns
    and empty data; EnvironmentIssue where the hub cannot be reached.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be at least 1, or left out for all rows.")
    places: list[str] = []
    if source.startswith("generated:"):
        dataset = _generate(source, split)
    elif _is_file_name(source):
        dataset, places = _read_file(Path(source).expanduser(), limit, convert)
    else:
        dataset = _converted(turns.read(_load_hub(source, split), source), source, convert)
    if not {"chosen", "rejected"} <= set(dataset.column_names):
        raise formats.without_sides(dataset.column_names, source, dataset[0] if len(dataset) else None)
    if len(dataset) == 0:
        raise DataError(f"{source} (split {split!r}) holds no rows.")
    found = formats.detect(dataset.column_names, dataset[0])
    if found.kind in formats.CONVERTED_PAIRS:
        get_logger().info("%s: %s rows (%s), converted to messages", source, found, found.why)
        dataset = formats.convert(dataset, places or [f"{source}, row {row}" for row in range(1, len(dataset) + 1)])
    names = dataset.column_names
    dataset = objects.restored(dataset.select_columns([name for name in (*COLUMNS, *SYSTEM) if name in names]))
    say_left_out(names, COLUMNS, source)
    dataset = place_system(dataset, source)
    dataset = dataset.select_columns([name for name in COLUMNS if name in names])
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _is_file_name(source: str) -> bool:
    path = Path(source).expanduser()
    if path.exists():
        return path.is_file()
    return source.endswith(SUFFIXES + _OTHER_SUFFIXES) or reads_as_path(source)


def _generate(source: str, split: str):
    name, _, query = source.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if name != _GENERATED:
        raise DataError(f"{source!r} is not known; the generated data set is {_GENERATED!r}.")
    try:
        n, seed = _integer(options, "n", 256), _integer(options, "seed", 0)
        if options:
            raise ValueError(f"unknown option {next(iter(options))!r}.")
        train = reverse_list_pairs(n, seed)
        return train if split == "train" else reverse_list_pairs(n, seed + 1, exclude=train)
    except ValueError as error:
        raise DataError(f"{source!r}: {error} Write it as {_GENERATED}?n=256&seed=0.") from None


def _integer(options: dict, name: str, default: int) -> int:
    value = options.pop(name, default)
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name}={value!r} is no integer.") from None


def _converted(dataset, source: str, convert: bool):
    """A data set of a known shape as pairs; others as they are."""
    known = convert and len(dataset) and shapes.find(dataset.column_names, dataset[0], (shapes.PAIRS,), source)
    return shapes.convert(dataset, source) if known else dataset


def _read_file(path: Path, limit: int | None, convert: bool):
    """The rows of a file, and where each one is; no places where that is its number."""
    from datasets.exceptions import DatasetGenerationError

    if not path.exists():
        raise DataError(f"{path} does not exist (working folder: {Path.cwd()}).")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path} is of an unknown kind; readable are {', '.join(SUFFIXES)}.")
    if path.suffix == ".parquet":
        return _read_parquet(path, convert), []
    rows, places = [], []
    found = _as_messages(_json_rows(path), limit, str(path))
    for place, row in shapes.read(found, (shapes.PAIRS,), str(path)) if convert else found:
        rows.append(_checked(row, place, is_first=not rows))
        places.append(place)
        if len(rows) == limit:
            break
    if not rows:
        raise DataError(f"{path} holds no rows.")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = _columns_to_read(set(names), rows[0])
    say_left_out(names, columns, str(path))
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
    """Rows with their places as `turns.Turns` reads them, told by the first `limit`."""
    first = list(itertools.islice(found, limit))
    places, rows = [place for place, _ in first], [row for _, row in first]
    read = turns.Turns(rows, places, name)
    try:
        for place, row in itertools.chain(first, found):
            yield place, {**row, **read.changed(row, place)} if isinstance(row, dict) else row
    finally:
        read.say()


def _columns_to_read(names: set[str], row: dict) -> list[str]:
    """The columns that pairs have, and of rows that are yet to be converted those that this takes."""
    wanted = (*COLUMNS, *SYSTEM)
    if formats.detect(names, row).kind in formats.CONVERTED_PAIRS:
        wanted = dict.fromkeys((*wanted, *formats.CONVERTED_COLUMNS))
    return [name for name in wanted if name in names]


def mixed_types(rows: Sequence[dict], places: Sequence[str], source, error: Exception) -> DataError:
    """The error to raise where the values of some column have no common type, which pyarrow said as `error`."""
    seen: dict[str, tuple[str, str]] = {}
    for place, row in zip(places, rows, strict=True):
        half = _half_character(row)
        if half:
            return DataError(
                f"{place}: {half!r} is half of a surrogate pair, and no character. Mend the row, or leave it out."
            )
        for name, value in row.items():
            for part, kind in _kinds(value, name):
                known, where = seen.setdefault(part, (kind, place))
                if kind != known:
                    return DataError(
                        f"{place}: {part} is {kind}, and in {where} it is {known}; all rows need the same type. Mend "
                        "the row, or leave it out."
                    )
    return DataError(f"{source}: the rows do not have the same types throughout: {error}")


def _half_character(row: dict) -> str | None:
    """A lone surrogate, which JSON can write and a text cannot hold."""
    found = re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False, default=str))
    return found and found.group()


def _kinds(value, name: str) -> Iterator[tuple[str, str]]:
    """What kind of value a column holds, and each part of it; null may stand for any."""
    if value is None:
        return
    names = {
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        dict: "an object",
        list: "a list",
    }
    yield name, names.get(type(value), "a value")
    parts = [(f"{name}[]", item) for item in value] if isinstance(value, list) else []
    parts += [(f"{name}.{key}", item) for key, item in value.items()] if isinstance(value, dict) else []
    for part, item in parts:
        yield from _kinds(item, part)


def _read_parquet(path: Path, convert: bool):
    table = turns.read(read_parquet(path, READ), str(path))
    names, first = table.column_names, table[0] if len(table) else {}
    if convert and shapes.find(names, first, (shapes.PAIRS,), str(path)):
        return shapes.convert(table, str(path))
    if not {"chosen", "rejected"} <= set(names):
        raise formats.without_sides(names, path, first or None)
    columns = _columns_to_read(set(names), first)
    say_left_out(names, columns, str(path))
    return table.select_columns(columns)


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Each row with the words that say where it is."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 1
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            if path.suffix == ".json":
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise DataError(f"{path} must hold a list of rows, not {_kind(rows)}; rows on lines are .jsonl.")
                yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    # without the line's end, after which the parser would count another line
                    yield f"{path}, line {number}", json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        # A line is parsed alone, a .json file as a whole: one of the two numbers is 1.
        line = number + error.lineno - 1
        hint = ""
        if path.suffix == ".json" and error.msg.startswith("Extra data"):
            hint = " A file with a row on each line is to be named .jsonl."
        raise DataError(f"{path}, line {line}, column {error.colno}: broken JSON: {error.msg}.{hint}") from None
    except UnicodeDecodeError as error:
        # the text was decoded in blocks, whose positions say nothing
        with opener(path, "rb") as file:
            number = next(number for number, line in enumerate(file, 1) if not _is_utf8(line))
        raise DataError(f"{path}, line {number}: not UTF-8 text ({error.reason}); save the file as UTF-8.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as gzipped UTF-8 text: {error}") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        # lists in lists without end, or a number of thousands of digits
        place = path if path.suffix == ".json" else f"{path}, line {number}"
        raise DataError(f"{place}: JSON that cannot be read: {error}.") from None


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _checked(row, place: str, is_first: bool) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be an object with 'chosen' and 'rejected', not {_kind(row)}.")
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


def _load_hub(source: str, split: str):
    from datasets import load_dataset
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetsError

    if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
        return _load_saved(source, split)
    try:
        return load_dataset(source, split=split)
    except EmptyDatasetError:
        raise DataError(
            f"the data set {source!r} is a folder without data files that can be read; give a file "
            f"({', '.join(SUFFIXES)}), or a folder of some."
        ) from None
    except (DatasetsError, OSError, ValueError) as error:
        if out_of_reach(error):
            raise EnvironmentIssue(
                f"the data set {source!r} is no file or folder here, and the hub cannot be reached. "
                f"{offline_reason()}, or give a local file."
            ) from None
        raise DataError(f"the data set {source!r} (split {split!r}) cannot be loaded: {error}") from None


def _load_saved(source: str, split: str):
    """What `save_to_disk` wrote: a data set, which is taken for any split, or several by name."""
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(source)
    except (OSError, ValueError) as error:
        raise DataError(f"the data set in the folder {source!r} cannot be read: {error}") from None
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise DataError(f"the data set in the folder {source!r} has no split {split!r}; it has {', '.join(saved)}.")
    return saved[split]


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), repr(value))
