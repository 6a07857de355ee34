"""Nested values of rows: messages, tools and settings of the template, kept in a data set as the rows have them.

Arrow gives the objects of a column one set of keys: each gets those of all others, as null, their order, and floats for
whole numbers where any row has a float. What the template would see of it is another row than the one written.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from posttrain.errors import DataError
from posttrain.log import get_logger

# The columns that a chat template sees.
COLUMNS = (
    *("prompt", "chosen", "rejected", "completion", "demonstration", "messages", "conversations"),
    *("tools", "chat_template_kwargs"),
)
# The types of blocks that hold text
TEXTS = ("text", "input_text", "output_text")
_IMAGES = {"image", "images"}
_LISTS, _OBJECTS = "lists", "objects"
_CALLS, _NO_CALLS = ("tool_calls", "function_call"), (None, [], {})
# The keys of messages that Arrow keeps as they are.
_PLAIN = ({"role", "content"}, {"from", "value"})


def exact(rows: Sequence[Mapping], names: Iterable[str] | None = None, places: Sequence[str] = ()):
    """Make a `datasets.Dataset` of rows whose nested values come out as they went in.

    Columns of texts, numbers and messages that all have the same keys, with texts, are what `Dataset.from_list` makes
    of them; others are stored as JSON (`datasets.Json`).

    Args:
        names: the columns, null where a row lacks one. Default: those that any row has.
        places: where each row is, for errors. Default: its number, from 1.

    Raises DataError for a number that the JSON of `datasets` cannot hold, and what `Dataset.from_list` raises for
    columns whose values have no common type.
    """
    from datasets import Dataset, Features, Json, List

    names = list(dict.fromkeys(name for row in rows for name in row)) if names is None else list(names)
    columns = {name: [row.get(name) for row in rows] for name in names}
    kinds = {name: _kind(values) for name, values in columns.items()}
    stored = {name: _as_json(columns[name], name, places) for name, kind in kinds.items() if kind is not None}
    stored = {name: values for name, values in stored.items() if values is not None}
    if not stored:
        return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
    others = [name for name in names if name not in stored]
    known = Dataset.from_list([{name: row.get(name) for name in others} for row in rows]).features if others else {}
    features = {name: Json() if kinds[name] == _OBJECTS else List(Json()) for name in stored}
    features = Features({name: features.get(name, known.get(name)) for name in names})
    columns |= stored
    return Dataset.from_list([{name: columns[name][i] for name in names} for i in range(len(rows))], features=features)


def restored(dataset, columns: Iterable[str] = COLUMNS):
    """Return a data set with its messages, tools and template settings as the rows had them, and blocks of text as
    text.

    What Arrow filled up with null is left out again; a null that a row really had in an object goes with it, as the
    two cannot be told apart. Columns that are stored as JSON hold their nulls. Null for `chat_template_kwargs` becomes
    an empty object. Where nothing is to be done the data set itself is returned.

    Args:
        dataset: a `datasets.Dataset`, or a stream, of which each row is mended as it comes up.
        columns: the columns to look at.
    """
    if not hasattr(dataset, "column_names"):
        return dataset
    features, names = dataset.features or {}, set(names_of(dataset))
    if _IMAGES & names or any(_holds_images(feature) for feature in features.values()):
        return dataset
    if not hasattr(dataset, "__len__"):
        if features and not any(map(_is_nested, features.values())):
            return dataset
        return dataset.map(functools.partial(_restored_row, features=features, columns=columns))
    # a user's own transform makes the rows, and may make them as it likes
    if dataset.format["type"] == "custom" or not len(dataset):
        return dataset
    looked_at = [name for name in columns if name in names and _is_nested(features[name])]
    changed = [name for name in looked_at if _may_be_padded(features[name])]
    changed += _with_blocks(dataset, [name for name in looked_at if name not in changed])
    return _mended(dataset, {name: features[name] for name in changed}) if changed else dataset


def without_empty_images(dataset, name: str):
    """Return a data set without columns of images that are empty in all rows, which is said; `name`: what it is called.

    Trainers go by the column alone, and take its rows for images.
    """
    is_sized = hasattr(dataset, "column_names") and hasattr(dataset, "__len__")
    if not is_sized or dataset.format["type"] == "custom" or not len(dataset):
        return dataset
    columns = [column for column in dataset.column_names if column in _IMAGES]
    empty = [column for column in columns if _is_empty_column(dataset, column)]
    if not empty:
        return dataset
    get_logger().info("%s: left out: column %s, empty in all rows", name, " and ".join(empty))
    return dataset.remove_columns(empty)


def _is_empty_column(dataset, column: str) -> bool:
    # as Arrow, no image is decoded
    batches = dataset.with_format("arrow").select_columns([column]).iter(1000)
    return not any(value for batch in batches for value in batch[column].to_pylist())


def names_of(dataset) -> list[str]:
    """Return the names of a data set's columns; of a stream that does not know them, those of its first row.

    Empty for what is no data set.
    """
    if not hasattr(dataset, "column_names"):
        return []
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def unpadded(dataset) -> Iterator[dict]:
    """Return the rows of a `datasets.Dataset` without the nulls that Arrow filled their objects up with."""
    features = dataset.features
    nested = [name for name, feature in features.items() if _is_nested(feature)]
    for row in dataset:
        yield row | {name: _unpadded(row[name], features[name]) for name in nested}


def as_json(value: list | None) -> list[str] | None:
    """Write messages as the JSON texts that a column of `List(Json())` takes: `datasets` would write fewer digits
    itself.
    """
    return value and [json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value]


def flattened(value):
    """Return messages as templates expect them: lists of nothing but blocks of text joined, and without calls that
    are none.

    Null, `[]` and `{}` for `tool_calls` or `function_call` are no call, though many templates look for the key alone.
    Where nothing is to be done the value itself is returned.
    """
    if not isinstance(value, list) or not any(_is_text_blocks(turn) or _calls_nothing(turn) for turn in value):
        return value
    return [_flat(turn) if isinstance(turn, Mapping) else turn for turn in value]


def _flat(message: Mapping) -> dict:
    made = {key: part for key, part in message.items() if key not in _CALLS or part not in _NO_CALLS}
    if _is_text_blocks(message):
        made["content"] = "".join(block["text"] for block in message["content"])
    return made


def _calls_nothing(message) -> bool:
    return isinstance(message, Mapping) and any(key in message and message[key] in _NO_CALLS for key in _CALLS)


def quietly_mapped(dataset, function, **kwargs):
    """Call `dataset.map`, without a bar."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        return dataset.map(function, **kwargs)
    disable_progress_bars()
    try:
        return dataset.map(function, **kwargs)
    finally:
        enable_progress_bars()


def _is_text_blocks(message) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    return isinstance(content, list) and all(
        isinstance(block, Mapping) and block.get("type", "text") in TEXTS and isinstance(block.get("text"), str)
        for block in content
    )


def _kind(values: list) -> str | None:
    """Tell how a column is to be stored: None where Arrow keeps it as it is."""
    there = [value for value in values if value is not None]
    if there and all(isinstance(value, Mapping) for value in there):
        return _OBJECTS
    if not there or not all(isinstance(value, list) for value in there):
        return None
    items = [item for value in there for item in value]
    if not any(isinstance(item, Mapping) for item in items):
        return None
    if not all(item is None or (isinstance(item, Mapping) and _may_be_said(item)) for item in items):
        # Arrow refuses values of several types, of which the caller names the place
        return None
    keys = list(items[0]) if isinstance(items[0], Mapping) else []
    alike = set(keys) in _PLAIN and all(
        item is not None and list(item) == keys and all(isinstance(part, str) for part in item.values())
        for item in items
    )
    return None if alike else _LISTS


def _may_be_said(item: Mapping) -> bool:
    content = item.get("content")
    is_blocks = isinstance(content, list) and all(isinstance(block, Mapping) for block in content)
    return content is None or isinstance(content, str) or is_blocks


def _as_json(values: list, name: str, places: Sequence[str] = ()) -> list | None:
    """Return the objects of a column as JSON texts; None where they hold what JSON does not have."""
    from datasets.features.features import Json

    read, made, rounded = Json().decode_example, [], None

    def text(value, row: int):
        nonlocal rounded
        if value is None:
            return None
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if "\\ud" not in written and not any("\ud800" <= letter <= "\udfff" for letter in written):
            back = _read(read, written, place(row), name)
            if back != value and rounded is None:
                rounded = place(row)
        return written

    def place(row: int) -> str:
        return places[row] if places else f"row {row + 1}"

    try:
        for row, value in enumerate(values):
            made.append([text(item, row) for item in value] if isinstance(value, list) else text(value, row))
    except (TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        return None
    if rounded:
        get_logger().warning(
            "%s: %s holds a number with so many digits that its last one is lost. Write it as a text.", rounded, name
        )
    return made


def _read(read, written: str, place: str, name: str):
    try:
        return read(written)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: {name} holds a value that cannot be kept as JSON ({error}). Write a number beyond 64 bits as a "
            "text."
        ) from None


def _restored_row(row: Mapping, features: Mapping, columns: Iterable[str]) -> dict:
    # without the features of a stream, an object's null can be nothing but filling
    mended = {name: _restored(row[name], name, features.get(name)) for name in columns if name in row}
    return {**row, **mended}


def _restored(value, name: str, feature):
    value = flattened(_unpadded(value, feature))
    return {} if value is None and name == "chat_template_kwargs" else value


def _unpadded(value, feature):
    """Return a value without the null entries of its objects, as far as they are Arrow's.

    A message keeps its content.
    """
    from datasets.features.features import Json

    if isinstance(feature, Json):
        return value
    if isinstance(value, Mapping):
        return {
            key: _unpadded(part, _part(feature, key))
            for key, part in value.items()
            if part is not None or (key == "content" and "role" in value)
        }
    if isinstance(value, list):
        return [_unpadded(item, _item(feature)) for item in value]
    return value


def _part(feature, key: str):
    return feature.get(key) if isinstance(feature, Mapping) else None


def _item(feature):
    if isinstance(feature, list):
        return feature[0] if feature else None
    return getattr(feature, "feature", None)


def _is_nested(feature) -> bool:
    """Tell whether a column holds objects, or lists of them."""
    from datasets.features.features import Json

    feature = feature if _item(feature) is None else _item(feature)
    return isinstance(feature, Mapping | Json) or (_item(feature) is not None and _is_nested(feature))


def _may_be_padded(feature) -> bool:
    """Tell whether a column's objects have more than a role and a text."""
    from datasets.features.features import Json, Value

    item = _item(feature)
    if isinstance(item, Json) or isinstance(feature, Json):
        return False
    return not (
        isinstance(item, Mapping) and set(item) in _PLAIN and all(isinstance(part, Value) for part in item.values())
    )


def _holds_images(feature) -> bool:
    from datasets.features import Image

    if isinstance(feature, Image):
        return True
    if isinstance(feature, Mapping):
        return any(map(_holds_images, feature.values()))
    return _item(feature) is not None and _holds_images(_item(feature))


def _with_blocks(dataset, names: Sequence[str]) -> list[str]:
    """Return those of the columns, none of which Arrow filled up, with content to flatten or a null to replace."""
    found, left = set(), list(names)
    for batch in dataset.with_format(None).select_columns(left).iter(1000) if left else ():
        for name in left:
            is_settings = name == "chat_template_kwargs"
            if any(flattened(value) is not value or (value is None and is_settings) for value in batch[name]):
                found.add(name)
        if len(found) == len(left):
            break
    return [name for name in names if name in found]


def _mended(dataset, changed: Mapping):
    """Return the data set with the columns `changed`, of these features, restored and stored as JSON."""
    from datasets import Features, Json, List

    kinds = {name: Json() if _item(feature) is None else List(Json()) for name, feature in changed.items()}
    features, form = Features({**dataset.features, **kinds}), dataset.format
    mend = functools.partial(_mended_batch, changed=dict(changed))
    mended = quietly_mapped(dataset.with_format(None), mend, batched=True, features=features)
    return mended if form["type"] is None else mended.with_format(form["type"], **form["format_kwargs"])


def _mended_batch(batch: Mapping, changed: Mapping) -> dict:
    made = {}
    for name, feature in changed.items():
        made[name] = _as_json([_restored(value, name, feature) for value in batch[name]], name)
        if made[name] is None:
            raise DataError(f"the column {name} holds a value that JSON does not have, such as NaN or a date.")
    return made
