"""What to do about a row that a chat template refuses."""

import json
from collections.abc import Callable, Iterable, Mapping

from posttrain.data.rendering.bounds import EndlessTemplate
from posttrain.visible import one_line


def refusal(error: Exception, conversations: Iterable[list], render: Callable[[list], object]) -> str:
    """Return a sentence about a row that the template refuses, with the remedy where writing it in another form is one.

    Args:
        error: what the template raised. conversations: the messages of the row, with each of its answers.
        render: of messages; raises where the template refuses them.
    """
    if isinstance(error, EndlessTemplate):
        return str(error)
    said = f"the row cannot be turned into tokens: {type(error).__name__}: {one_line(error)}"
    conversations = [messages for messages in conversations if isinstance(messages, list)]
    for change, remedy in _REMEDIES:
        others = [change(messages) for messages in conversations]
        if others == conversations:
            continue
        try:
            for messages in others:
                render(messages)
        # a template can refuse anything
        except Exception:
            continue
        return f"{said.rstrip('.')}. {remedy}, which this chat template takes."
    if "alternate" in str(error):
        return f"{said.rstrip('.')}. Leave out rows whose turns do not alternate, or join or move turns until they do."
    return said


def _with_objects(messages: list) -> list:
    return [_with_arguments(message, _as_object) for message in messages]


def _with_texts(messages: list) -> list:
    return [_with_arguments(message, _as_text) for message in messages]


def _with_functions(messages: list) -> list:
    """Make messages whose calls have their name and arguments under the key function."""
    made = []
    for message in messages:
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        if isinstance(calls, list) and any(isinstance(call, Mapping) and "function" not in call for call in calls):
            message = {**message, "tool_calls": [_wrapped(call) for call in calls]}
        made.append(message)
    return made


def _wrapped(call):
    if not isinstance(call, Mapping) or "function" in call:
        return call
    function = {key: call[key] for key in ("name", "arguments") if key in call}
    return {"type": "function", **{key: call[key] for key in call if key not in function}, "function": function}


def _without_system(messages: list) -> list:
    """Make messages whose system text stands at the beginning of the turn behind it."""
    first = messages[0] if messages else None
    if not isinstance(first, Mapping) or first.get("role") not in ("system", "developer") or len(messages) < 2:
        return messages
    contents = [first.get("content"), messages[1].get("content")]
    if not all(isinstance(content, str) for content in contents):
        return messages
    return [{**messages[1], "content": "\n\n".join(contents)}, *messages[2:]]


def _with_joined_turns(messages: list) -> list:
    """Make messages in which no role speaks twice in a row."""
    made: list = []
    for message in messages:
        before = made[-1] if made else {}
        texts = [turn.get("content") for turn in (before, message)]
        if before.get("role") == message.get("role") and all(isinstance(text, str) for text in texts):
            made[-1] = {**before, "content": "\n\n".join(texts)}
        else:
            made.append(message)
    return made


_REMEDIES = (
    (_with_objects, "Give the arguments of tool calls as an object, not as a JSON text"),
    (_with_texts, "Give the arguments of tool calls as a JSON text, not as an object"),
    (_with_functions, 'Write each call as {"type": "function", "function": {"name": ..., "arguments": ...}}'),
    (
        lambda messages: _with_texts(_with_functions(messages)),
        'Write each call as {"type": "function", "function": {"name": ..., "arguments": ...}}, its arguments as a JSON '
        "text",
    ),
    (_without_system, "Put the system's text at the beginning of the user's turn"),
    (_with_joined_turns, "Join turns of one role that follow each other"),
    (
        lambda messages: _with_joined_turns(_without_system(messages)),
        "Put the system's text at the beginning of the user's turn, and join turns of one role that follow each other",
    ),
)


def _as_object(arguments):
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return read if isinstance(read, dict) else arguments


def _as_text(arguments):
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else arguments


def _with_arguments(message, read: Callable):
    if not isinstance(message, Mapping) or not isinstance(message.get("tool_calls"), list):
        return message
    return {**message, "tool_calls": [_call_with(call, read) for call in message["tool_calls"]]}


def _call_with(call, read: Callable):
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    made = {**function, "arguments": read(function["arguments"])}
    return {**call, "function": made} if "function" in call else made
