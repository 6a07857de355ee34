"""The shapes that well-known data sets are published in, told by their columns and first row, and converted."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from posttrain.data import formats, objects
from posttrain.data.columns import system_in_front
from posttrain.data.known_shapes import ANSWERS, PAIRS, SHAPES, TASKS, WHOLE, LeftOut, Shape, anything
from posttrain.errors import DataError
from posttrain.log import get_logger

# In the order in which they are looked for
KINDS = (PAIRS, ANSWERS, TASKS)
__all__ = [
    "ANSWERS", "KINDS", "LeftOut", "PAIRS", "Shape", "TASKS", "WHOLE", "as_ours", "convert", "convert_row", "find",
    "of_any_kind", "read", "read_all",
]  # fmt: skip


def find(columns: Iterable[str], row: Mapping, kinds: Sequence[str] = KINDS, name: str = "the data set"):
    """Return the shape of a data set whose first row is `row`: of the first of the `kinds` that has one; else None.

    Raises DataError where two shapes of a kind fit.
    """
    names = set(columns)
    for kind in kinds:
        fitting = [
            shape
            for shape in SHAPES
            if shape.kind == kind
            and names.issuperset(shape.columns)
            and not names.intersection(shape.without)
            and all(row.get(column) is not None for column in shape.columns)
            and shape.fits(row)
        ]
        if len(fitting) > 1:
            found = "; ".join(f"{shape.name} ({shape.why})" for shape in fitting)
            raise DataError(
                f"{name} could be rows of several kinds: {found}. Leave out the columns of the others, or read the "
                "rows as they are: convert_rows: false in a recipe, convert=False in Python, --as-is in a command."
            )
        if fitting:
            return fitting[0]
    return None


def of_any_kind(columns: Sequence[str], row: Mapping, kind: str | None, name: str) -> Shape:
    """Return the shape of rows that are to be converted to one `kind`, or to the only one that they can be.

    Raises DataError where there is none, or where rows can be of several kinds and none is named.
    """
    kinds = [one for one in KINDS if kind in (None, one)]
    fitting = [shape for one in kinds if (shape := find(columns, row, (one,), name))]
    if len(fitting) > 1:
        ways = "; ".join(f"--to {shape.kind}: {shape.reads}" for shape in fitting)
        raise DataError(f"{name}: {fitting[0].name} rows can be read in several ways. Say which: {ways}.")
    if fitting:
        return fitting[0]
    given = formats.detect(columns, row)
    into = {formats.ALPACA_PREFERENCE: PAIRS, formats.SHAREGPT_PREFERENCE: PAIRS}.get(given.kind)
    if into and kind in (None, into):
        return Shape(given.kind, into, (), anything, lambda row: [formats.convert_row(row, given)], given.why)
    known = ", ".join(dict.fromkeys(shape.name for shape in SHAPES if kind in (None, shape.kind)))
    raise DataError(
        f"{name}: nothing to convert: these are {given} rows ({given.why}). Converted"
        f"{f' to {kind}' if kind else ''} are {known}."
    )


def as_ours(rows: list, places: list[str], shape: Shape | None, name: str) -> tuple[list[dict], list[str]]:
    """Convert rows of a shape, or without one as they are, with their system messages in front of the conversation."""
    if shape is not None:
        found = list(_read_as(shape, zip(places, rows, strict=True), name))
        rows, places = [row for _, row in found], [place for place, _ in found]
    placed = [{**row, **system_in_front(row, place)} for row, place in zip(rows, places, strict=True)]
    return placed, places


def read(found: Iterable[tuple[str, object]], kinds: Sequence[str], name: str) -> Iterator[tuple[str, object]]:
    """Read rows with their places, converted where the first of them is of a known shape, which is said.

    Raises DataError with its place for a row that lacks what the shape has, and where all rows are left out.
    """
    found = iter(found)
    first = next(found, None)
    if first is None:
        return
    row = first[1]
    shape = find(row, row, kinds, name) if isinstance(row, Mapping) else None
    if shape is None:
        yield first
        yield from found
        return
    get_logger().info("%s: %s rows (%s); converted to %s", name, shape.name, shape.why, shape.kind)
    yield from _read_as(shape, itertools.chain([first], found), name)


def _read_as(shape: Shape, found: Iterable[tuple[str, object]], name: str) -> Iterator[tuple[str, dict]]:
    left_out, made, unscored = Counter(), 0, 0
    for place, row in found:
        try:
            for new in convert_row(row, shape, place):
                made += 1
                yield place, new
            unscored += shape.unscored(row)
        except LeftOut as reason:
            left_out[str(reason)] += 1
    if unscored:
        get_logger().warning("%s: %d answers are left out: they have no score", name, unscored)
    for reason, count in left_out.items():
        get_logger().warning("%s: %d rows are left out: %s", name, count, reason)
    if left_out and not made:
        raise DataError(f"{name}: none of its {sum(left_out.values())} rows can be used: {', '.join(left_out)}.")


def read_all(rows: Sequence, places: Sequence[str], kinds: Sequence[str], name: str) -> tuple[list, list[str]]:
    """Read as `read` does rows at hand: rows and places."""
    found = list(read(zip(places, rows, strict=True), kinds, name))
    return [row for _, row in found], [place for place, _ in found]


def convert_row(row, shape: Shape, place: str = "the row") -> list[dict]:
    """Return the rows that a row becomes.

    Columns that take no part stay. Raises DataError with its place, and LeftOut.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: a row must be an object.")
    missing = [column for column in shape.columns if row.get(column) is None]
    if missing:
        raise DataError(
            f"{place}: {missing[0]!r} is missing, which {shape.name} rows have. Fill it in, or leave it out."
        )
    try:
        made = shape.convert(row)
    except DataError as error:
        # what is wrong with the row is said already, but not where it is
        raise DataError(f"{place}: {str(error).removeprefix(f'{formats.NO_PLACE}: ')}") from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            f"{place}: the row is not like the other {shape.name} rows ({shape.why}): {type(error).__name__}: "
            f"{str(error).rstrip('.')}."
        ) from None
    others = {column: value for column, value in row.items() if column not in (*shape.columns, "messages")}
    return [{**others, **new} for new in made]


def convert(dataset, name: str = "the data set", kinds: Sequence[str] = (PAIRS,)):
    """Convert a `datasets.Dataset` of a known shape to rows of ours.

    Alpaca and sharegpt as `formats.convert`; others as are.

    `kinds`: what is wanted: PAIRS, ANSWERS, TASKS; of several, the first that the shape has. Raises as `read`.
    """
    if len(dataset) == 0:
        return dataset
    rows = dataset.with_format(None)
    if find(dataset.column_names, rows[0], kinds, name) is None:
        return formats.convert(dataset)
    numbered = ((f"{name}, row {number}", row) for number, row in enumerate(objects.unpadded(rows), 1))
    return objects.exact([row for _, row in read(numbered, kinds, name)])
