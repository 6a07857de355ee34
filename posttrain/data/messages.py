"""Texts and conversations as TRL takes them, and a row's system message in front of its own."""

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


def style_of(value, column: str, place: str) -> str:
    """Return `a text` or `a list of messages`; DataError for anything else."""
    if isinstance(value, str):
        return "a text"
    problem = None
    if not isinstance(value, list) or not value:
        problem = f"{column} is {described(value)}"
    else:
        for number, message in enumerate(value, 1):
            problem = message_problem(message)
            if problem:
                problem = f"{column} is a list whose item {number} {problem}"
                break
    if problem is None:
        return "a list of messages"
    raise DataError(
        f"{place}: {problem}. It must be a text, or a list of messages such as "
        '[{"role": "user", "content": "Hello"}]; mend the row or leave it out.'
    )


def message_problem(message) -> str | None:
    if not isinstance(message, Mapping):
        return f"is {described(message)}"
    if "from" in message and "value" in message:
        return "is a sharegpt turn (posttrain.data.formats.convert makes messages of those)"
    if not isinstance(message.get("role"), str):
        return f"has no role (its keys: {', '.join(map(str, message)) or 'none'})"
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return None
    if isinstance(content, list) and all(isinstance(block, Mapping) for block in content):
        return None
    if isinstance(content, str):
        return None
    call = ", and its call in the key function_call, which is to be tool_calls" if message.get("function_call") else ""
    return f"has a content that is {described(content)}{call}"


def is_empty(side) -> bool:
    """Tell whether a side says nothing: of messages, the last one counts."""
    if isinstance(side, str):
        return not side.strip()
    content = side[-1].get("content")
    if side[-1].get("tool_calls"):
        return False
    if isinstance(content, str):
        return not content.strip()
    return all(
        block.get("type", "text") in objects.TEXTS and not (block.get("text") or "").strip() for block in content
    )


def described(value) -> str:
    """Describe a value of the wrong type in a few words."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"an object with the keys {', '.join(map(str, value)) or 'none'}"
    if isinstance(value, list):
        return f"a list of {type(value[0]).__name__}" if value else "an empty list"
    shown = repr(value)
    kind = "a text" if isinstance(value, str) else "a number" if isinstance(value, (int, float)) else "a value"
    return f"{kind} ({shown if len(shown) <= 40 else shown[:37] + '...'})"
