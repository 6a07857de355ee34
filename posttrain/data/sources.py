"""Reading files, hub data sets and saved folders of rows of any kind."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from posttrain.data import folders, generators, objects
from posttrain.data.columns import READ
from posttrain.data.parquet import read_parquet
from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.remote import offline_reason, out_of_reach, reads_as_path

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet")
# Characters of a row. A .json file is read as a whole: its bytes, and the lists and objects in it, which take some 200
# bytes of memory each.
LONGEST_LINE, LONGEST_JSON, MOST_OBJECTS = 64 << 20, 128 << 20, 5_000_000
_OTHER_SUFFIXES = (".csv", ".tsv", ".txt", ".gz", ".zip", ".zst", ".xz", ".arrow", ".yaml", ".yml", ".xlsx")


def is_file_name(source: str) -> bool:
    path = Path(source).expanduser()
    if path.exists():
        return path.is_file()
    return source.endswith(SUFFIXES + _OTHER_SUFFIXES) or reads_as_path(source)


def mixed_types(rows: Sequence[dict], places: Sequence[str], source, error: Exception) -> DataError:
    """Return the error to raise where the values of some column have no common type, which pyarrow said as `error`."""
    seen: dict[str, tuple[str, str]] = {}
    for place, row in zip(places, rows, strict=True):
        if half := half_characters([row], [place]):
            return half
        for name, value in row.items():
            for part, kind in _kinds(value, name):
                known, where = seen.setdefault(part, (kind, place))
                if kind != known:
                    return DataError(
                        f"{place}: {part} is {kind}, and in {where} it is {known}; all rows need the same type. Mend "
                        "the row, or leave it out."
                    )
    return DataError(f"{source}: the rows do not have the same types throughout: {error}")


def half_characters(rows: Iterable[dict], places: Iterable[str]) -> DataError | None:
    """Return the error to raise for the first row with a lone surrogate, which JSON can write and a text cannot hold.

    Names of columns count as well. None where there is no such row.
    """
    for place, row in zip(places, rows, strict=True):
        if found := re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False, default=str)):
            return DataError(
                f"{place}: {found.group()!r} is half of a surrogate pair, and no character. Mend the row, or leave it "
                "out."
            )
    return None


def _kinds(value, name: str) -> Iterator[tuple[str, str]]:
    """Tell what kind of value a column holds, and each part of it; null may stand for any."""
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


def json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Read each row with the words that say where it is."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 1
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            if path.suffix == ".json":
                _check_whole(path)
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise DataError(f"{path} must hold a list of rows, not {kind_of(rows)}; rows on lines are .jsonl.")
                yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
                return
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), 1):
                if len(line) >= LONGEST_LINE:
                    raise DataError(
                        f"{path}, line {number}: longer than {LONGEST_LINE >> 20} million characters, which is no row. "
                        "Rows stand on a line each in a .jsonl file."
                    )
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
            lines = enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1)
            number = next(number for number, line in lines if not _is_utf8(line))
        raise DataError(f"{path}, line {number}: not UTF-8 text ({error.reason}); save the file as UTF-8.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as gzipped UTF-8 text: {error}") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        # lists in lists without end, or a number of thousands of digits
        place = path if path.suffix == ".json" else f"{path}, line {number}"
        raise DataError(f"{place}: JSON that cannot be read: {error}.") from None


def _check_whole(path: Path) -> None:
    """Refuse a .json file that would take more than some 2 GiB of memory."""
    size = objects = 0
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            size, objects = size + len(part), objects + part.count(b"[") + part.count(b"{")
            if size > LONGEST_JSON or objects > MOST_OBJECTS:
                what = f"{LONGEST_JSON >> 20} MiB" if size > LONGEST_JSON else f"{MOST_OBJECTS:,} lists and objects"
                raise DataError(
                    f"{path} has more than {what}, and a .json file is read as a whole. Write a row on each line of a "
                    ".jsonl file instead."
                )


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def load_hub(source: str, split: str, **given):
    """Load a split of a hub data set, or of a folder that `datasets` reads or wrote.

    `given`: `name`, `data_dir` and `data_files` of `datasets.load_dataset`, as far as they are set.

    Of a folder only files are read that lie in it, and those of `data_files`.
    """
    from datasets import load_dataset, load_dataset_builder
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetsError

    if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
        return load_saved(source, split)
    try:
        if not Path(source).is_dir():
            return load_dataset(source, split=split, **given)
        folders.check_before(source)
        if "data_files" not in given:
            folders.check_files(source, load_dataset_builder(source, **given))
        dataset = load_dataset(source, split=split, **given)
        folders.check_media(source, dataset)
        return dataset
    except DataError:
        raise
    except EmptyDatasetError:
        raise DataError(
            f"the data set {source!r} is a folder without data files that can be read; give a file "
            f"({', '.join(SUFFIXES)}), or a folder of some."
        ) from None
    # the last of a folder with a script, which is not run
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        if out_of_reach(error):
            raise EnvironmentIssue(
                f"the data set {source!r} is no file or folder here, and the hub cannot be reached. "
                f"{offline_reason()}, or give a local file."
            ) from None
        what = ", ".join(f"{name} {value!r}" for name, value in (*given.items(), ("split", split)))
        raise DataError(f"the data set {source!r} ({what}) cannot be loaded: {error}") from None


def refuse_hub_settings(source: str, given: dict) -> None:
    """Refuse settings of `load_hub` for a local file."""
    if given and is_file_name(source):
        name = next(iter(given))
        raise ConfigError(f"{source}: {name} is {given[name]!r}, which is for data sets of the hub; leave it out.")


def load_saved(source: str, split: str):
    """Tell what `save_to_disk` wrote: a data set, which is taken for any split, or several by name."""
    from datasets import DatasetDict, load_from_disk

    folders.check_saved(source)
    try:
        saved = load_from_disk(source)
    except (OSError, ValueError) as error:
        raise DataError(f"the data set in the folder {source!r} cannot be read: {error}") from None
    if not isinstance(saved, DatasetDict):
        folders.check_media(source, saved)
        return saved
    if split not in saved:
        raise DataError(f"the data set in the folder {source!r} has no split {split!r}; it has {', '.join(saved)}.")
    folders.check_media(source, saved[split])
    return saved[split]


def kind_of(value) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), repr(value))


def read_rows(source: str, split: str = "train", limit: int | None = None, **given) -> tuple[list[dict], list[str]]:
    """Return the rows of a source as plain objects, and the words that say where each one is.

    `source`: what `load_preferences` takes: a local .json, .jsonl, .jsonl.gz or .parquet file, a hub id, or what
    `generators.make` makes. `limit`: the first rows only. `given`: as in `load_hub`, for hub data sets alone.

    Raises DataError for a missing file, an unknown kind of file, broken JSON (with the line), rows that are no objects
    and empty data; EnvironmentIssue where the hub cannot be reached.
    """
    path = Path(source).expanduser()
    refuse_hub_settings(source, given)
    if not generators.is_made(source) and is_file_name(source):
        if not path.exists():
            raise DataError(f"{path} does not exist (working folder: {Path.cwd()}).")
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path} is of an unknown kind; readable are {', '.join(SUFFIXES)}.")
        found = _parquet_rows(path) if path.suffix == ".parquet" else json_rows(path)
    else:
        made = generators.is_made(source)
        found = objects.unpadded(generators.make(source, split) if made else load_hub(source, split, **given))
        found = ((f"{source}, row {number}", row) for number, row in enumerate(found, 1))
    rows, places = [], []
    for place, row in found:
        if not isinstance(row, dict):
            raise DataError(f"{place}: a row must be an object, not {kind_of(row)}.")
        rows.append(row)
        places.append(place)
        if len(rows) == limit:
            break
    if not rows:
        raise DataError(f"{source} holds no rows.")
    return rows, places


def _parquet_rows(path: Path):
    for number, row in enumerate(objects.unpadded(read_parquet(path, READ)), 1):
        yield f"{path}, row {number}", row
