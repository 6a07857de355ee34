"""Reading instructions: a hub data set, a local file, or generated ones."""

from posttrain.data import formats, generators, objects, shapes, turns
from posttrain.data.columns import first_with_system, log_left_out_columns, log_system_messages
from posttrain.data.formats import Format
from posttrain.data.messages import described, is_empty, style_of, with_system
from posttrain.data.rows import columns_of
from posttrain.data.sources import mixed_types, read_rows
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger
from posttrain.visible import listed

# of each kind, the columns that hold a row's texts
PARTS = {
    formats.PROMPT_COMPLETION: ("prompt", "completion"),
    formats.UNPAIRED: ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "text": ("text",),
}
COLUMNS = ("prompt", "completion", "messages", "conversations", "text", "tools", "chat_template_kwargs")
_CONVERTED = (formats.ALPACA, formats.SHAREGPT)
_NEEDED = (
    "Needed: prompt and completion, messages, or text. A row looks like this:\n"
    '  {"prompt": "2 + 2 =", "completion": " 4"}'
)


def load_instructions(
    source: str,
    split: str = "train",
    limit: int | None = None,
    convert: bool = True,
    beside: tuple[str, ...] = (),
    **given,
):
    """Load rows to learn from as a `datasets.Dataset` with the columns of `COLUMNS` that the source has.

    Args:
        source: what `posttrain.data.sources.read_rows` reads: a local .json, .jsonl, .jsonl.gz or .parquet file, a hub
            id, or a generated data set. Rows are prompt and completion, messages, or text; alpaca and sharegpt rows
            become messages. Of tasks the demonstration is the completion, of generated pairs the chosen side.
        split: of a hub data set. limit: the first rows only.
        convert: rows of the shapes of tasks in `posttrain.data.shapes`, such as GSM8K's, which is said.
        beside: other columns that are kept where the source has them, as they are.
        given: `name`, `data_dir`, `data_files` of `datasets.load_dataset`, for hub data sets.

    Raises:
        DataError: what cannot be read, missing columns, and values that are no texts or messages, with their place.
        ConfigError: a limit below 1. EnvironmentIssue: the hub cannot be reached.
    """
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise ConfigError(f"limit={limit!r} must be at least 1, or left out for all rows.")
    rows, places = read_rows(source, split, limit, **given)
    rows = turns.read_all(rows, places, source)
    if convert and not generators.is_made(source):
        rows, places = _of_tasks(rows, places, source)
    if generators.is_made(source):
        rows = [_kept(row, beside) | _with_answer(row) for row in rows]
    found = formats.detect(columns_of(rows), rows[0])
    if found.kind in _CONVERTED:
        get_logger().info("%s: %s rows (%s), converted to messages", source, found, found.why)
        rows = [
            _kept(row, beside) | formats.convert_row(row, found, place) for row, place in zip(rows, places, strict=True)
        ]
        found = formats.detect(columns_of(rows), rows[0])
    else:
        with_one = first_with_system(rows)
        if with_one is not None:
            log_system_messages({**with_one, "prompt": with_one.get("prompt", with_one.get("messages"))}, source)
        rows = [_placed(row, place) for row, place in zip(rows, places, strict=True)]
    check_rows(rows, places, parts_of(columns_of(rows), rows[0], source))
    read = (*COLUMNS, *(name for name in beside if name not in COLUMNS))
    names = [name for name in read if name in columns_of(rows)]
    log_left_out_columns(columns_of(rows), read, source)
    try:
        return objects.exact(rows, names, places)
    except (TypeError, ValueError, OverflowError) as error:
        # pyarrow's own errors are ValueErrors or TypeErrors
        raise mixed_types(rows, places, source, error) from None


def parts_of(columns: list[str], row: dict, name: str, is_loaded: bool = False) -> tuple[str, ...]:
    """Return the columns that hold the rows' texts; DataError for rows that are no instructions.

    `is_loaded`: they are a `datasets.Dataset` at hand, which can be mended as one.
    """
    found: Format = formats.detect(columns, row)
    parts = PARTS.get(found.kind)
    if found.kind == formats.LANGUAGE_MODELLING:
        parts = PARTS[next(column for column in ("messages", "conversations", "text") if column in columns)]
    if parts:
        return parts
    message = f"{name} holds {found} rows ({found.why}). Found: {listed(columns)}. {_NEEDED}"
    if found.kind in _CONVERTED and is_loaded:
        message += "\nConvert them first:\n  from posttrain.data.formats import convert\n  dataset = convert(dataset)"
    elif "chosen" in columns and is_loaded:
        message += '\nTo learn the chosen side:\n  dataset = dataset.rename_column("chosen", "completion")'
    raise DataError(message)


def check_rows(rows, places, parts: tuple[str, ...]) -> None:
    """Raise DataError for a value that is no text or list of messages, or says nothing, with its place."""
    first = {}
    for row, place in zip(rows, places, strict=True):
        for part in parts:
            value = row.get(part)
            if value is None:
                raise DataError(f"{place}: {part} is {described(value)}. Fill it in, or leave the row out.")
            style = style_of(value, part, place)
            known, where = first.setdefault("style", (style, place))
            if style != known:
                raise DataError(f"{place}: {part} is {style}, and in {where} it is {known}; write all rows alike.")
        if is_empty(row[parts[-1]]):
            raise DataError(f"{place}: {parts[-1]} is empty, so nothing is to be learned. Leave the row out.")


def _kept(row: dict, beside: tuple[str, ...]) -> dict:
    return {name: row[name] for name in beside if name in row}


def _of_tasks(rows: list[dict], places: list[str], source: str) -> tuple[list[dict], list[str]]:
    names = columns_of(rows)
    if any(set(part) <= set(names) for part in PARTS.values()) or not isinstance(rows[0], dict):
        return rows, places
    shape = shapes.find(names, rows[0], (shapes.TASKS,), source)
    if shape is None and set(names) >= {"question", "answer"}:
        get_logger().info("%s: question is the prompt, answer is the completion", source)
        return [{"prompt": _said("user", row.get("question")), **row} | {
            "completion": _said("assistant", row.get("answer"))} for row in rows], places  # fmt: skip
    if shape is None:
        return rows, places
    rows, places = shapes.read_all(rows, places, (shapes.TASKS,), source)
    return [_with_answer(row) for row in rows], places


def _said(role: str, text):
    return text if text is None else [{"role": role, "content": text}]


def _with_answer(row: dict) -> dict:
    """Turn a task or a pair into prompt and completion."""
    answer = row.get("demonstration", row.get("chosen"))
    if answer is None or "completion" in row:
        return row
    if isinstance(answer, str) and formats.is_messages(row.get("prompt")):
        answer = _said("assistant", answer)
    return {"prompt": row["prompt"], "completion": answer}


def _placed(row: dict, place: str) -> dict:
    """Put a row's system message in front of its conversation."""
    name = next((one for one in ("prompt", "messages", "conversations") if formats.is_messages(row.get(one))), None)
    return row if name is None else {**row, name: with_system(row, row[name], name, place)}
