"""Columns beside the conversation: a system message of its own, and those that are left out under a known name."""

from collections.abc import Iterable, Mapping

from posttrain.data import formats, objects, turns
from posttrain.data.messages import SYSTEM, system_column, system_in_front
from posttrain.log import get_logger

# What some kind of row, or a published shape, has beside `formats.KNOWN_COLUMNS`
_OF_SHAPES = (
    *("question", "query", "problem", "solution", "answer", "response", "demonstration", "gold", "reward", "baseline"),
    *("system_prompt", "margin", "image", "images", "ground_truth", "reward_model", "completions", "answers"),
)
# Columns that are read somewhere, and not left out for their type
READ = (*formats.KNOWN_COLUMNS, *_OF_SHAPES)
# Names of columns that known formats use, beside those
_KNOWN_ELSEWHERE = (
    # what a question is about: passages, options to choose from, and who is asked
    *(
        "context",
        "contexts",
        "ctxs",
        "passage",
        "passages",
        "document",
        "documents",
        "article",
        "paragraph",
        "paragraphs",
    ),
    *("background", "story", "knowledge", "evidence", "references", "premise", "hypothesis", "table", "schema"),
    *("options", "choices", "endings", "persona", "personality", "dialogue", "dialog", "hint", "hints", "examples"),
    # a system message under another name
    *("system_message", "system_msg", "sys_prompt", "system_text", "system_instruction", "instruction_system"),
    *("test_list", "starter_code", "function_call", "functions", "audio", "video", "videos"),
)


def place_system(dataset, name: str):
    """Put each row's column `system` of a data set, or a stream, in front of its messages, which is said.

    The column stays, for those who read it. Raises as `system_in_front`.
    """
    from datasets import concatenate_datasets

    columns = objects.names_of(dataset)
    if not any(column in columns for column in SYSTEM) or not {"prompt", "chosen"} & set(columns):
        return dataset
    if not hasattr(dataset, "__len__"):
        return dataset.map(lambda row, index: system_in_front(row, f"{name}, row {index + 1}"), with_indices=True)
    parts = [column for column in ("prompt", "chosen", "rejected") if column in columns]
    read = [column for column in (*SYSTEM, *parts) if column in columns]
    rows = list(objects.unpadded(dataset.with_format(None).select_columns(read)))
    first = first_with_system(rows)
    # rows that are yet to be converted get theirs then
    if (
        first is None
        or formats.detect(columns, first).kind in formats.CONVERTED_PAIRS
        or not log_system_messages(first, name)
    ):
        return dataset
    placed = [{**row, **system_in_front(row, f"{name}, row {number}")} for number, row in enumerate(rows, 1)]
    made, form = objects.exact(placed, parts), dataset.format
    made = concatenate_datasets([dataset.with_format(None).remove_columns(parts), made], axis=1)
    return made.select_columns(columns).with_format(form["type"], **form["format_kwargs"])


def prepare(given, name: str, read: Iterable[str] | None = None):
    """Place the system messages of a data set, of several by name or of None.

    `read`: the columns that are read, where others of known names are to be said.
    """
    if isinstance(given, Mapping):
        return type(given)({one: prepare(dataset, str(one), read) for one, dataset in given.items()})
    if read is not None:
        log_left_out_columns(objects.names_of(given), read, name)
    return place_system(turns.read(objects.without_empty_images(given, name), name), name)


def log_system_messages(row: Mapping, name: str) -> bool:
    """Say what becomes of a data set's system messages, going by a row that has one; whether they can be placed."""
    column = system_column(row)
    if any(formats.is_messages(row.get(part)) for part in ("prompt", "chosen")):
        get_logger().info("%s: the column %s is put in front of the messages", name, column)
        return True
    get_logger().warning(
        "%s: the column %s is left out: a text has no place for a system message. Write the rows as messages, or put "
        "it into the texts of the prompts.", name, column,
    )  # fmt: skip
    return False


def first_with_system(rows: Iterable[Mapping]) -> Mapping | None:
    """Return the first row that has a system message."""
    return next((row for row in rows if system_column(row)), None)


def log_left_out_columns(columns: Iterable[str], read: Iterable[str], name: str) -> list[str]:
    """Say which columns are not read though a known format uses their name; returns them."""
    known = {*READ, *_KNOWN_ELSEWHERE} - {*read, *SYSTEM}
    left_out = [column for column in columns if column in known]
    if left_out:
        get_logger().info(
            "%s: left out: column%s %s, though %s a name that known formats use. Rename what should be read.",
            name, "s" * (len(left_out) > 1), ", ".join(left_out), "each has" if len(left_out) > 1 else "it has",
        )  # fmt: skip
    return left_out
