"""Columns beside the conversation: a system message of its own, and those that are left out under a known name."""

from collections.abc import Iterable, Mapping

from posttrain.data import formats, objects
from posttrain.errors import DataError
from posttrain.log import get_logger

# The first that a row has is its system message.
SYSTEM = ("system", "system_prompt")
# Names of columns that known formats use, beside those that our own kinds of rows have
_KNOWN_ELSEWHERE = (
    *("question", "query", "problem", "solution", "answer", "response", "demonstration", "gold", "reward", "baseline"),
    *("system_prompt", "margin", "image", "images", "ground_truth", "reward_model"),
)


def system_in_front(row: Mapping, place: str) -> dict:
    """The columns of a row that change where its system message is put in front of its conversation.

    That is the prompt, or without one both sides. Nothing changes in rows of texts, in those without a system message,
    and in those that begin with it. Raises DataError for a system message that is no text, and for a conversation that
    begins with another one.
    """
    column = _system_column(row)
    if column is None:
        return {}
    system, changed = row[column], {}
    if not isinstance(system, str):
        raise DataError(f"{place}: {column} is of type {type(system).__name__}; it must be a text. Mend the row.")
    for name in ("prompt",) if "prompt" in row else ("chosen", "rejected"):
        messages = row.get(name)
        if not formats.is_messages(messages):
            continue
        first = messages[0]
        if first.get("role") in ("system", "developer"):
            if _text(first.get("content")).strip() == system.strip():
                continue
            raise DataError(
                f"{place}: the column {column} holds a system message, and {name} begins with another one. Leave one "
                "of them out."
            )
        blocks = isinstance(first.get("content"), list)
        content = [{"type": "text", "text": system}] if blocks else system
        changed[name] = [{"role": "system", "content": content}, *messages]
    return changed


def place_system(dataset, name: str):
    """A data set, or a stream, with each row's column `system` in front of its messages, which is said.

    The column stays, for those who read it. Raises as `system_in_front`.
    """
    from datasets import concatenate_datasets

    columns = getattr(dataset, "column_names", None) or ()
    if not any(column in columns for column in SYSTEM) or not {"prompt", "chosen"} & set(columns):
        return dataset
    if not hasattr(dataset, "__len__"):
        return dataset.map(lambda row, index: system_in_front(row, f"{name}, row {index + 1}"), with_indices=True)
    parts = [column for column in ("prompt", "chosen", "rejected") if column in columns]
    read = [column for column in (*SYSTEM, *parts) if column in columns]
    rows = list(objects.unpadded(dataset.with_format(None).select_columns(read)))
    first = first_with_system(rows)
    if first is None or not say_system(first, name):
        return dataset
    placed = [{**row, **system_in_front(row, f"{name}, row {number}")} for number, row in enumerate(rows, 1)]
    made, form = objects.exact(placed, parts), dataset.format
    made = concatenate_datasets([dataset.with_format(None).remove_columns(parts), made], axis=1)
    return made.select_columns(columns).with_format(form["type"], **form["format_kwargs"])


def prepare(given, name: str, read: Iterable[str] | None = None):
    """A data set, several by name or None, each with its system messages placed.

    `read`: the columns that are read, where others of known names are to be said.
    """
    if isinstance(given, Mapping):
        return type(given)({one: prepare(dataset, str(one), read) for one, dataset in given.items()})
    if read is not None and getattr(given, "column_names", None):
        say_left_out(given.column_names, read, name)
    return place_system(given, name)


def say_system(row: Mapping, name: str) -> bool:
    """Say what becomes of a data set's system messages, going by a row that has one; whether they can be placed."""
    column = _system_column(row)
    if any(formats.is_messages(row.get(part)) for part in ("prompt", "chosen")):
        get_logger().info("%s: the column %s is put in front of the messages", name, column)
        return True
    get_logger().warning(
        "%s: the column %s is left out: a text has no place for a system message. Write the rows as messages, or put "
        "it into the texts of the prompts.", name, column,
    )  # fmt: skip
    return False


def first_with_system(rows: Iterable[Mapping]) -> Mapping | None:
    """The first row that has a system message."""
    return next((row for row in rows if _system_column(row)), None)


def say_left_out(columns: Iterable[str], read: Iterable[str], name: str) -> list[str]:
    """Say which columns are not read though a known format uses their name; returns them."""
    known = {*formats.KNOWN_COLUMNS, *_KNOWN_ELSEWHERE} - {*read, *SYSTEM}
    left_out = [column for column in columns if column in known]
    if left_out:
        get_logger().info(
            "%s: left out: column%s %s, though %s a name that known formats use. Rename what should be read.",
            name, "s" * (len(left_out) > 1), ", ".join(left_out), "each has" if len(left_out) > 1 else "it has",
        )  # fmt: skip
    return left_out


def _system_column(row: Mapping) -> str | None:
    """The column that holds a row's system message; None where there is none."""
    for column in SYSTEM:
        value = row.get(column)
        if value is not None and not (isinstance(value, str) and not value.strip()):
            return column
    return None


def _text(content) -> str:
    """The text of a message's content, blocks of text joined."""
    if isinstance(content, list):
        return "".join(block.get("text") or "" for block in content if isinstance(block, Mapping))
    return content or ""
