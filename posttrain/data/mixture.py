"""Putting several data sets of the same kind together, each read and checked on its own."""

from collections.abc import Sequence

from posttrain.data import objects
from posttrain.data.sources import mixed_types
from posttrain.errors import DataError
from posttrain.log import get_logger

# A row that lacks one of these is as one whose value is null
_OPTIONAL = ("tools", "chat_template_kwargs")


def select_columns(dataset, columns: Sequence[str] | None, name: str):
    """Keep the named columns of a data set; all of them for None. DataError names one that is missing."""
    for column in columns or ():
        if column not in dataset.column_names:
            raise DataError(f"{name}: columns has {column!r}, which is missing; found {dataset.column_names}.")
    return dataset if columns is None else dataset.select_columns(list(columns))


def mix(parts: dict[str, object], counts: Sequence[int]):
    """Put the first rows of each data set after one another, in the order of `parts`.

    Args:
        parts: `datasets.Dataset`s by their names for messages.
        counts: how many rows of each.

    Raises:
        DataError: a data set lacks a column that another has, or has it of another type.
    """
    from datasets import concatenate_datasets
    from datasets.exceptions import DatasetGenerationError

    taken = {
        name: part.select(range(count)) for (name, part), count in zip(parts.items(), counts, strict=True) if count
    }
    for name, part in taken.items():
        for other, against in taken.items():
            lacking = [n for n in against.column_names if n not in part.column_names and n not in _OPTIONAL]
            if lacking:
                raise DataError(
                    f"{name} has no column {lacking[0]!r}, which {other} has; found {part.column_names}. Add it, or "
                    f"leave it out of the other entry with `columns`."
                )
    get_logger().info("data: %s", ", ".join(f"{len(part)} rows of {name}" for name, part in taken.items()))
    first = next(iter(taken.values()))
    if all(part.features == first.features for part in taken.values()):
        return concatenate_datasets(list(taken.values()))
    rows, places = [], []
    for name, part in taken.items():
        rows += objects.unpadded(part)
        places += [f"{name}, row {number}" for number in range(1, len(part) + 1)]
    try:
        return objects.exact(rows, places=places)
    except (TypeError, ValueError, OverflowError, DatasetGenerationError) as error:
        # pyarrow's own errors are ValueErrors or TypeErrors
        raise mixed_types(rows, places, ", ".join(taken), error) from None
