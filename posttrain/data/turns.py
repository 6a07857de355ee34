"""Conversations as exports write them: messages as JSON text, and prompts that end with an open turn."""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence

from posttrain.data import formats, objects
from posttrain.data.messages import without_open_turn
from posttrain.errors import DataError
from posttrain.log import get_logger

_ANSWERS = ("chosen", "rejected", "completion", "demonstration")
COLUMNS = ("prompt", *_ANSWERS, "messages", "conversations", "context", "conversation_a", "conversation_b")
# Whose turns of from and value are read where rows are converted
_SHAREGPT = ("messages", "conversations")
_BEGINS = re.compile(r"\s*\[\s*\{")
# What a list of messages begins with, whoever printed it
_PRINTED = re.compile(r"""\s*\[\s*\{\s*(['"])(role|content|from|value)\1\s*:""")


class Turns:
    """How the conversations of a data set's rows are written.

    Args:
        rows: the rows that tell it. places: where each is. name: of the data set, for messages.
        columns: further columns that hold conversations, and what each is to be called (`prompt`, `completion`).

    Raises DataError where most texts of a column begin like a list of messages and are no JSON.
    """

    def __init__(
        self,
        rows: Iterable[Mapping],
        places: Iterable[str],
        name: str,
        columns: Mapping[str, str] | None = None,
    ):
        self.prompts = [theirs for theirs, ours in (columns or {}).items() if ours == "prompt"]
        self.name, self.opened, self.first_opened = name, 0, ""
        self.columns = tuple(dict.fromkeys((*COLUMNS, *(columns or ()))))
        texts, lists, others, first = {}, {}, {}, {}
        for row, place in zip(rows, places, strict=False):
            for column in self.columns if isinstance(row, Mapping) else ():
                value = row.get(column)
                if not isinstance(value, str) or not value.strip():
                    continue
                texts[column] = texts.get(column, 0) + 1
                if not _BEGINS.match(value):
                    continue
                if _is_written(row, column):
                    lists[column] = lists.get(column, 0) + 1
                elif _PRINTED.match(value) and messages_in(value) is None:
                    others[column] = others.get(column, 0) + 1
                    first.setdefault(column, (place, value))
        for column, count in others.items():
            if 2 * (count + lists.get(column, 0)) > texts[column]:
                place, value = first[column]
                raise DataError(
                    f"{place}: {column} is the text {value[:60]!r}, which begins like a list of messages and is no "
                    "JSON, as where Python printed the list. Write the messages with `json.dumps(messages)`, or as a "
                    "list in a .jsonl or .parquet file."
                )
        self.written = [column for column in self.columns if 2 * lists.get(column, 0) > texts.get(column, 0)]

    def changed(self, row: Mapping, place: str) -> dict:
        """Return the columns of a row that change: messages for their JSON, and prompts without an open turn.

        Raises DataError for a text that is no JSON of messages in a column that holds them.
        """
        made = {column: self._read(row, column, place) for column in self.written if row.get(column)}
        made = {column: value for column, value in made.items() if value is not row[column]}
        for column in [one for one in self.columns if one in self.prompts or _ends_open(one, row)]:
            value = made.get(column, row.get(column))
            closed = without_open_turn(value)
            if closed is not value:
                made[column] = closed
                self.opened += 1
                self.first_opened = self.first_opened or place
        return made

    def say(self) -> None:
        """Say in the log what `changed` did."""
        if self.written:
            get_logger().info(
                "%s: the column%s %s hold%s messages as JSON text, read as messages",
                self.name, "s" * (len(self.written) > 1), ", ".join(self.written), "s" * (len(self.written) == 1),
            )  # fmt: skip
        if self.opened:
            get_logger().info(
                "%s: %d prompts end with an empty turn of the assistant, which is left out, as the answer takes its "
                "place (first: %s)",
                self.name, self.opened, self.first_opened,
            )  # fmt: skip

    def _read(self, row: Mapping, column: str, place: str):
        value = row[column]
        if not isinstance(value, str) or not value.strip():
            return value
        read = messages_in(value)
        if read is None:
            raise DataError(
                f"{place}: {column} is the text {value[:60]!r}, and in other rows it is the JSON of a list of "
                "messages. Write it so here as well, or leave the row out."
            )
        # sides beside conversations are converted with them
        return read if column in _SHAREGPT or "conversations" in row else formats.messages_of(read, column, place)


def read_all(rows: Sequence, places: Sequence[str], name: str, columns: Mapping[str, str] | None = None) -> list:
    """Return rows with messages for their JSON, and without open turns at the end of prompts, which is said.

    Args and errors as of `Turns`.
    """
    turns = Turns(rows, places, name, columns)
    made = [
        {**row, **turns.changed(row, place)} if isinstance(row, Mapping) else row
        for row, place in zip(rows, places, strict=True)
    ]
    turns.say()
    return made


def read(dataset, name: str):
    """Read as `read_all` does a `datasets.Dataset` or a stream; the data set itself where nothing changes.

    Of a stream each row tells for itself, where the first one holds conversations.
    """
    from datasets import concatenate_datasets

    columns = [column for column in COLUMNS if column in objects.names_of(dataset)]
    if not columns:
        return dataset
    if not hasattr(dataset, "__len__"):
        first = next(iter(dataset), {})
        if not any(_is_of_turns(first.get(column), column, first) for column in columns):
            return dataset
        return dataset.map(functools.partial(_of_stream, name=name))
    if dataset.format["type"] == "custom" or not any(_may_change(dataset, column) for column in columns):
        return dataset
    plain = dataset.with_format(None)
    told = plain.select_columns([c for c in (*columns, "ground_truth") if c in dataset.column_names])
    rows = list(objects.unpadded(told))
    places = [f"{name}, row {number}" for number in range(1, len(rows) + 1)]
    turns = Turns(rows, places, name)
    made = [{**row, **turns.changed(row, place)} for row, place in zip(rows, places, strict=True)]
    turns.say()
    parts = [
        column for column in columns if any(new[column] is not old[column] for new, old in zip(made, rows, strict=True))
    ]
    if not parts:
        return dataset
    others, form = plain.remove_columns(parts), dataset.format
    made = objects.exact(made, parts, places)
    made = concatenate_datasets([others, made], axis=1) if others.column_names else made
    return made.select_columns(dataset.column_names).with_format(form["type"], **form["format_kwargs"])


def messages_in(text: str) -> list | None:
    """Return the messages whose JSON a text is, of role and content or of from and value; None for any other text."""
    if not _BEGINS.match(text):
        return None
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, list) and all(map(_is_turn, read)) else None


def _ends_open(column: str, columns) -> bool:
    """Tell whether a column holds prompts, of these columns of a row."""
    if column in ("prompt", "context"):
        return True
    answered = {"chosen", "rejected"} <= set(columns) and "prompt" not in columns
    return (column in _SHAREGPT and answered) or (column == "messages" and "ground_truth" in columns)


def _is_turn(turn) -> bool:
    return isinstance(turn, Mapping) and (
        isinstance(turn.get("role"), str) or (isinstance(turn.get("from"), str) and "value" in turn)
    )


def _is_written(row: Mapping, column: str) -> bool:
    """Tell whether a text of a row is the JSON of its messages, and no chat that the model is to write as JSON."""
    read = messages_in(row[column])
    prompt = row.get("prompt")
    if read is None or column not in _ANSWERS or not isinstance(prompt, str) or messages_in(prompt) is not None:
        return read is not None
    if read[0].get("role", read[0].get("from")) in ("assistant", "gpt"):
        return True
    said = [turn.get("content", turn.get("value")) for turn in read]
    return prompt.strip() in [text.strip() for text in said if isinstance(text, str)]


def _may_change(dataset, column: str) -> bool:
    """Tell whether a column holds a text that begins as messages do, or conversations."""
    batches = dataset.with_format(None).select_columns([column]).iter(1000)
    values = (value for batch in batches for value in batch[column])
    if getattr(dataset.features[column], "dtype", None) in ("string", "large_string"):
        return any(value and _BEGINS.match(value) for value in values)
    return _ends_open(column, dataset.column_names) and any(without_open_turn(value) is not value for value in values)


def _is_of_turns(value, column: str, row: Mapping) -> bool:
    """Tell whether a value of a stream's first row tells that rows of it may change."""
    if isinstance(value, str):
        return messages_in(value) is not None or bool(_PRINTED.match(value))
    return isinstance(value, list) and _ends_open(column, row)


def _of_stream(row: Mapping, name: str) -> dict:
    place = f"{name}, a row"
    return {**row, **Turns([row], [place], name).changed(row, place)}
