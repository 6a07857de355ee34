"""Conversations as TRL takes them, and a row's system message in front of its own."""

from collections.abc import Mapping

from posttrain.data import objects
from posttrain.data.rendering.marks import REASONING
from posttrain.errors import DataError

# The first that a row has is its system message.
SYSTEM = ("system", "system_prompt")


def is_messages(value) -> bool:
    """Tell whether a value is a conversation as TRL takes it: a list of objects with a role."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def without_open_turn(prompt):
    """Return a prompt without empty turns of the assistant at its end; the value itself where there is none.

    A turn with a call or a thought is not empty.
    """
    if not isinstance(prompt, list):
        return prompt
    end = len(prompt)
    while end and _is_open(prompt[end - 1]):
        end -= 1
    return prompt if end == len(prompt) else prompt[:end]


def system_column(row: Mapping) -> str | None:
    """Return the column that holds a row's system message; None where there is none."""
    for column in SYSTEM:
        value = row.get(column)
        if value is not None and not (isinstance(value, str) and not value.strip()):
            return column
    return None


def system_in_front(row: Mapping, place: str) -> dict:
    """Return the columns of a row that change where its system message is put in front of its conversation.

    That is the prompt, or without one both sides. Nothing changes in rows of texts, in those without a system message,
    and in those that begin with it. Raises DataError for a system message that is no text, and for a conversation that
    begins with another one.
    """
    column = system_column(row)
    if column is None:
        return {}
    _system_of(row, column, place)
    names = ("prompt",) if "prompt" in row else ("chosen", "rejected")
    placed = {name: with_system(row, row[name], name, place) for name in names if is_messages(row.get(name))}
    return {name: messages for name, messages in placed.items() if messages is not row[name]}


def with_system(row: Mapping, messages: list, name: str, place: str) -> list:
    """Put the system message of their row in front of messages, the list itself where that changes nothing.

    `name`: what the messages are called in errors. Raises as `system_in_front`.
    """
    column = system_column(row)
    if column is None:
        return messages
    system = _system_of(row, column, place)
    first = messages[0] if messages else {}
    if first.get("role") in ("system", "developer"):
        if _text(first.get("content")).strip() == system.strip():
            return messages
        raise DataError(
            f"{place}: the column {column} holds a system message, and {name} begins with another one. Leave one of "
            "them out."
        )
    blocks = isinstance(first.get("content"), list)
    content = [{"type": "text", "text": system}] if blocks else system
    return [{"role": "system", "content": content}, *messages]


def _system_of(row: Mapping, column: str, place: str) -> str:
    system = row[column]
    if not isinstance(system, str):
        raise DataError(f"{place}: {column} is of type {type(system).__name__}; it must be a text. Mend the row.")
    return system


def _text(content) -> str:
    """Return the text of a message's content, blocks of text joined."""
    if isinstance(content, list):
        return "".join(block.get("text") or "" for block in content if isinstance(block, Mapping))
    return content or ""


def _is_open(turn) -> bool:
    if not isinstance(turn, Mapping) or turn.get("role", turn.get("from")) not in ("assistant", "gpt"):
        return False
    if any(turn.get(key) for key in ("tool_calls", "function_call", *REASONING)):
        return False
    return _is_blank(turn.get("content", turn.get("value")))


def _is_blank(content) -> bool:
    if isinstance(content, list):
        return all(
            isinstance(block, Mapping) and block.get("type", "text") in objects.TEXTS and _is_blank(block.get("text"))
            for block in content
        )
    return content is None or (isinstance(content, str) and not content.strip())
