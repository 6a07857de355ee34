"""Reading parquet files, whose columns can be of types that `datasets` does not have."""

from collections.abc import Iterable
from pathlib import Path

from posttrain.errors import DataError
from posttrain.log import get_logger


def read_parquet(path: Path, needed: Iterable[str] = ()):
    """Read a parquet file as a `datasets.Dataset`, without the columns of types that this cannot hold, which is said.

    Such are maps, and extension types like UUIDs. `needed`: names of columns that are not left out. Raises DataError
    for a file that cannot be read, and for one of those columns of such a type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        table = pq.read_table(path)
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
    return Dataset(table)


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
