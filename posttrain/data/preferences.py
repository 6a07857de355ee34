"""Reading preference pairs: a hub data set, a local file, or generated ones."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl

from posttrain.data.procedural import reverse_list_pairs
from posttrain.errors import ConfigError, DataError, EnvironmentIssue

COLUMNS = ("prompt", "chosen", "rejected", "flip_rate", "tools", "chat_template_kwargs")
SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet")
_GENERATED = "generated:reverse_list"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_OTHER_SUFFIXES = (".csv", ".tsv", ".txt", ".gz", ".zip", ".zst", ".xz", ".arrow", ".yaml", ".yml", ".xlsx")


def load_preferences(source: str, split: str = "train", limit: int | None = None):
    """Preference pairs as a `datasets.Dataset` with the columns of `COLUMNS` that the source has.

    `source` is one of - a local file: .json (a list of rows), .jsonl, .jsonl.gz or .parquet, whatever the
    `split`; - `generated:reverse_list`, with options as in `generated:reverse_list?n=256&seed=0`; any split
    but `train` gives
      pairs that are disjoint from the training ones;
    - a hub data set's id, or a folder that `datasets.load_dataset` reads.

    Every row needs `chosen` and `rejected`, texts or lists of messages; `prompt` may be missing where both
    sides begin with it, as TRL allows. `flip_rate` is optional, the other kept columns are TRL's. `limit`:
    the first rows only.

    Raises DataError for a missing file, an unknown kind of file, broken JSON (with the line), missing columns
    and empty data; EnvironmentIssue where the hub cannot be reached.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be at least 1, or left out for all rows.")
    if source.startswith("generated:"):
        dataset = _generate(source, split)
    elif _is_file_name(source):
        dataset = _read_file(Path(source).expanduser(), limit)
    else:
        dataset = _load_hub(source, split)
    _check_columns(dataset.column_names, source)
    if len(dataset) == 0:
        raise DataError(f"{source} (split {split!r}) holds no rows.")
    dataset = dataset.select_columns([name for name in COLUMNS if name in dataset.column_names])
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _is_file_name(source: str) -> bool:
    path = Path(source).expanduser()
    if path.exists():
        return path.is_file()
    return source.endswith(SUFFIXES + _OTHER_SUFFIXES) or not _HUB_ID.fullmatch(source)


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


def _read_file(path: Path, limit: int | None):
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.exists():
        raise DataError(f"{path} does not exist (working folder: {Path.cwd()}).")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path} is of an unknown kind; readable are {', '.join(SUFFIXES)}.")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    rows = []
    for place, row in _json_rows(path):
        rows.append(_checked(row, place))
        if len(rows) == limit:
            break
    if not rows:
        raise DataError(f"{path} holds no rows.")
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    if "prompt" in columns:
        for number, row in enumerate(rows, 1):
            if row.get("prompt") is None:
                raise DataError(f"{path}, row {number}: 'prompt' is missing, though other rows have it.")
    try:
        return Dataset.from_list([{name: row.get(name) for name in columns} for row in rows])
    except (TypeError, ValueError, OverflowError, DatasetGenerationError) as error:
        # pyarrow's own errors are ValueErrors or TypeErrors.
        raise DataError(f"{path}: the rows do not have the same types throughout: {error}") from None


def _read_parquet(path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        names = pq.read_schema(path).names
        _check_columns(names, path)
        return Dataset(pq.read_table(path, columns=[name for name in COLUMNS if name in names]))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from None


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
        raise DataError(f"{path}, line {line}, column {error.colno}: broken JSON: {error.msg}.") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        kind = "gzipped UTF-8" if path.suffix == ".gz" else "UTF-8"
        raise DataError(f"{path} cannot be read as {kind} text: {error}") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        # lists in lists without end, or a number of thousands of digits
        place = path if path.suffix == ".json" else f"{path}, line {number}"
        raise DataError(f"{place}: JSON that cannot be read: {error}.") from None


def _checked(row, place: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be an object with 'chosen' and 'rejected', not {_kind(row)}.")
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        raise DataError(f"{place}: {' and '.join(map(repr, missing))} missing; found {sorted(row)}.")
    return row


def _load_hub(source: str, split: str):
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(source, split=split)
    except ConnectionError as error:
        raise EnvironmentIssue(
            f"the data set {source!r} is not a local file, and the hub cannot be reached: {error}"
        ) from None
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"the data set {source!r} (split {split!r}) cannot be loaded: {error}") from None


def _check_columns(found: list[str], source) -> None:
    missing = [name for name in ("chosen", "rejected") if name not in found]
    if missing:
        raise DataError(
            f"{source}: column {' and '.join(map(repr, missing))} missing; found {sorted(found)}. Preference "
            "pairs need 'chosen' and 'rejected', and 'prompt' unless both sides begin with it."
        )


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), repr(value))
