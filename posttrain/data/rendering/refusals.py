"""What to do about a row that a chat template refuses."""

import json
from collections.abc import Callable, Iterable, Mapping


def refusal(error: Exception, conversations: Iterable[list], render: Callable[[list], object]) -> str:
    """A sentence about a row that the template refuses, with the remedy where writing it in another form is one.

    Args:
        error: what the template raised. conversations: the messages of the row, with each of its answers.
        render: of messages; raises where the template refuses them.
    """
    said = f"the row cannot be turned into tokens: {type(error).__name__}: {error}"
    conversations = [messages for messages in conversations if isinstance(messages, list)]
    for read, form in ((_as_object, "an object, not as a JSON text"), (_as_text, "a JSON text, not as an object")):
        others = [[_with_arguments(message, read) for message in messages] for messages in conversations]
        if others == conversations:
            continue
        try:
            for messages in others:
                render(messages)
        # a template can refuse anything
        except Exception:
            continue
        return f"{said.rstrip('.')}. Give the arguments of tool calls as {form}, which this chat template takes."
    return said


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
