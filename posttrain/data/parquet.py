"""Reading parquet files, whose columns can be of types that `datasets` does not have, in bounded memory."""

from collections.abc import Iterable
from pathlib import Path

from posttrain.bounded import in_memory
from posttrain.errors import DataError
from posttrain.log import get_logger

# Of a cell: as of a line of .jsonl.
LONGEST_CELL = 64 << 20
# What a file may hold, written out: rows, values and bytes, or as many as so and so many times its own bytes.
_MOST_ROWS, _MOST_VALUES, _MOST_BYTES = (1_000_000, 1), (20_000_000, 100), (1 << 29, 50)


def read_parquet(path: Path, needed: Iterable[str] = ()):
    """Read a parquet file as a `datasets.Dataset`, without the columns of types that this cannot hold, which is said.

    Such are maps, and extension types like UUIDs. `needed`: names of columns that are not left out. Raises DataError
    for a file that cannot be read, one that is far larger than its bytes, and for one of those columns of such a type.
    """
    import pyarrow as pa
    from datasets import Dataset

    try:
        table = _read(path)
    except MemoryError:
        raise _too_large(path) from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from None
    needed, left_out = set(needed), []
    for field in table.schema:
        if _is_known(field):
            continue
        if field.name in needed:
            raise DataError(
                f"{path}: the column {field.name} is of the Arrow type {_short(field.type)}, which cannot be read. "
                "Write it as texts, numbers, lists or objects (structs)."
            )
        left_out.append(field)
    if left_out:
        get_logger().warning(
            "%s: left out: %s, of %s that cannot be read.",
            path, " and ".join(f"the column {field.name} ({_short(field.type)})" for field in left_out),
            "Arrow types" if len(left_out) > 1 else "an Arrow type",
        )  # fmt: skip
        table = table.drop_columns([field.name for field in left_out])
    try:
        with in_memory(2 * _most(path.stat().st_size, _MOST_BYTES)):
            return Dataset(table)
    except (pa.ArrowException, MemoryError):
        raise _too_large(path) from None


def _read(path: Path):
    import pyarrow.parquet as pq

    size = path.stat().st_size
    with pq.ParquetFile(path) as file:
        found = file.metadata
        groups = [found.row_group(number) for number in range(found.num_row_groups)]
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        _check(path, size, "rows", found.num_rows, _MOST_ROWS)
        _check(path, size, "values", sum(column.num_values for column in columns), _MOST_VALUES)
        _check(path, size, "bytes", sum(column.total_uncompressed_size for column in columns), _MOST_BYTES)
        for group in groups:
            if group.total_byte_size > LONGEST_CELL * max(group.num_rows, 1):
                raise _too_long(path, f"a row of {group.total_byte_size // max(group.num_rows, 1):,} bytes")
        # a value that many rows have is written once, and what the file says of itself need not be so
        with in_memory(2 * _most(size, _MOST_BYTES)):
            table = file.read()
    _check_cells(path, table)
    _check(path, size, "bytes", table.nbytes + sum(map(_repeated, table.columns)), _MOST_BYTES)
    return table


def _most(size: int, limit: tuple[int, int]) -> int:
    return max(limit[0], limit[1] * size)


def _check(path: Path, size: int, what: str, found: int, limit: tuple[int, int]) -> None:
    if found > _most(size, limit):
        raise DataError(
            f"{path} has {size:,} bytes and holds {found:,} {what}; {_most(size, limit):,} are the most for its size. "
            "Write the rows to a .jsonl file, or to several files."
        )


def _too_long(path: Path, what: str) -> DataError:
    return DataError(f"{path} holds {what}, and {LONGEST_CELL:,} are the most. Leave the row out, or part it.")


def _too_large(path: Path) -> DataError:
    size = path.stat().st_size
    return DataError(
        f"{path} has {size:,} bytes and asks for more than {2 * _most(size, _MOST_BYTES):,} bytes of memory. Write the "
        "rows to a .jsonl file, or to several files."
    )


def _check_cells(path: Path, table) -> None:
    import pyarrow.compute as pc

    for name, column in zip(table.column_names, table.columns, strict=True):
        for texts in _texts(column):
            longest = pc.max(pc.binary_length(texts)).as_py() or 0
            if longest > LONGEST_CELL:
                raise _too_long(path, f"in the column {name} a text of {longest:,} bytes")


def _texts(column) -> list:
    """Return the arrays of texts in a column; of one that has a number for each row, the texts that these stand for."""
    import pyarrow as pa

    kind = column.type
    repeats = pa.types.is_dictionary(kind)
    kind = kind.value_type if repeats else kind
    if not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
        return []
    return [chunk.dictionary if repeats else chunk for chunk in column.chunks]


def _repeated(column) -> int:
    """Count the bytes of the rows of a column that holds each text once, with a number for each row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type):
        return 0
    lengths = zip(column.chunks, map(pc.binary_length, _texts(column)), strict=False)
    return sum(pc.sum(of_texts.take(chunk.indices)).as_py() or 0 for chunk, of_texts in lengths)


def _is_known(field) -> bool:
    import pyarrow as pa
    from datasets import Features

    try:
        Features.from_arrow_schema(pa.schema([field]))
    # what it raises differs from type to type
    except (ValueError, TypeError, NotImplementedError, KeyError):
        return False
    return True


def _short(kind) -> str:
    text = str(kind)
    return text if len(text) <= 60 else f"{text[:57]}..."
