"""Values in messages that are no texts: blocks and the arguments of tool calls, as the chat template writes them."""

import json
import os
from collections.abc import Callable, Iterator, Mapping

from posttrain.data.rendering.faults import Fault, short
from posttrain.data.rendering.round_trips import bare as _bare

# Stands in the place of a value
_VALUE = "qzvaluezq"


def faults(messages: list, index: int, text: str, render: Callable[[list], str]) -> Iterator[Fault]:
    """Find content that is no text, and the arguments of tool calls: Python's print of them in the place of a text.

    Args:
        messages: a conversation. index: of the message that is looked at.
        text: what was learned of the conversation's part that the message is in.
        render: renders a conversation through the chat template as a text; raises whatever the template raises.
    """
    message = messages[index]
    content = message.get("content")
    if isinstance(content, list) and content and _bare(str(content)) in _bare(text):
        yield _printed("a list of blocks", content, "Write the content as a text, or use a template for blocks.")
    elif isinstance(content, list) and not all(block.get("type", "text") == "text" for block in content):
        others = [block for block in content if block.get("type", "text") != "text"]
        fewer = [block for block in content if block.get("type", "text") == "text"]
        if _are_alike(messages, index, {**message, "content": fewer}, render):
            kinds = ", ".join(sorted({str(block.get("type")) for block in others}))
            yield Fault(
                ("blocks", kinds), f"the chat template drops blocks of the type {kinds}",
                short(json.dumps(others, default=str)),
                "The model cannot see what the answer is to. Leave those rows out, or take another model.",
                True,
            )  # fmt: skip
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        arguments, bare = function.get("arguments"), _bare(text)
        if isinstance(arguments, Mapping) and arguments:
            is_json = _bare(json.dumps(arguments, ensure_ascii=False)) in bare
            if _bare(str(arguments)) in bare and not is_json:
                yield _printed("the arguments of a tool call", arguments, "Give them as a JSON text.")
            elif not is_json:
                yield from _argument_faults(messages, index, call, render)
        if isinstance(arguments, str) and arguments and _bare(arguments) not in bare:
            if any(_bare(json.dumps(arguments, ensure_ascii=ascii)) in bare for ascii in (True, False)):
                yield Fault(
                    ("quoted",), "the chat template quotes the arguments of a tool call once more",
                    short(json.dumps(arguments)), "Give them as an object, not as a JSON text.", True,
                )  # fmt: skip


def _argument_faults(messages: list, index: int, call: Mapping, render: Callable[[list], str]) -> Iterator[Fault]:
    """Find values among the arguments of a call that the template writes as Python does, each told by a marker."""
    given = rendered(messages, render)
    for value, changed in _with_markers(call):
        calls = [changed if one is call else one for one in messages[index]["tool_calls"]]
        others = [*messages[:index], {**messages[index], "tool_calls": calls}, *messages[index + 1 :]]
        drawn = rendered(others, render)
        if drawn.count(_VALUE) != 1 or str(value) == json.dumps(value, ensure_ascii=False):
            continue
        written = given[len(os.path.commonprefix((given, drawn))) :]
        if written.startswith(str(value)):
            yield Fault(
                ("printed", "value"),
                "the chat template writes a value among the arguments of a tool call as Python prints it",
                str(value),
                "The model learns to call so. Write it as a text as the tool reads it ('true', 'null'), leave out "
                "what is null, or use a template that writes arguments as JSON.",
            )
            return


def _are_alike(messages: list, index: int, other: Mapping, render: Callable[[list], str]) -> bool:
    changed = [*messages[:index], other, *messages[index + 1 :]]
    try:
        return render(messages) == render(changed)
    # a template that refuses the other form does look at it
    except Exception:
        return False


def rendered(messages: list, render: Callable[[list], str]) -> str:
    """Render a conversation; an empty text where the template refuses it."""
    try:
        return render(messages)
    # rendering it as tokens has told what is wrong
    except Exception:
        return ""


def _with_markers(call: Mapping) -> Iterator[tuple[object, dict]]:
    """Find each value among the arguments of a call that Python prints in its own way, and the call with a marker
    there.
    """
    function = call.get("function", call)

    def each(value, put):
        if value is None or isinstance(value, bool | Mapping | list):
            yield value, put(_VALUE)
        parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, part in parts:
            yield from each(part, lambda new, key=key: put(_replaced(value, key, new)))

    def put(arguments) -> dict:
        made = {**function, "arguments": arguments}
        return {**call, "function": made} if "function" in call else made

    for key, part in function["arguments"].items():
        yield from each(part, lambda new, key=key: put(_replaced(function["arguments"], key, new)))


def _replaced(value, key, new):
    if isinstance(value, Mapping):
        return {**value, key: new}
    return [new if index == key else item for index, item in enumerate(value)]


def _printed(what: str, value, remedy: str) -> Fault:
    shown = short(str(value))
    return Fault(("printed", what), f"the chat template writes {what} as Python prints it", shown, remedy, True)
