"""Messages and tools with a marker in the place of each text, which show what a chat template does whatever it says."""

import json
from collections.abc import Mapping
from typing import NamedTuple

from posttrain.data.rendering.marks import REASONING
from posttrain.data.row_options import tools_of

# Where the objects of a list of reasoning hold their text
_OF_THOUGHTS = ("text", "summary", "thinking")


class Piece(NamedTuple):
    """A text of a message: of which kind, where, and what stands for it in the marked rendering."""

    kind: str
    index: int
    text: str
    marker: str


def marked(messages: list, tools) -> tuple[tuple[list, object], list[Piece], dict[str, str]]:
    """Return the messages and tools with a marker in the place of each text, the pieces, and the markers of tools'
    names.
    """
    pieces: list[Piece] = []
    names: dict[str, str] = {}
    of_tools: dict[str, str] = {}

    def marker(kind: str, index: int, text: str) -> str:
        pieces.append(Piece(kind, index, text, f"qz{len(pieces):04d}zq"))
        return pieces[-1].marker

    def name_of(name: str) -> str:
        return names.setdefault(name, f"fz{len(names):04d}zf")

    def name_of_tool(name: str) -> str:
        return of_tools.setdefault(name, f"tz{len(of_tools):04d}zt")

    tools = tools_of({"tools": tools})
    marked_tools = [_named(tool, name_of_tool) for tool in tools] if tools else tools
    made_messages = []
    for index, message in enumerate(messages):
        made = dict(message)
        content = message.get("content")
        if isinstance(content, str) and content.strip():
            made["content"] = marker("content", index, content)
        elif isinstance(content, list):
            made["content"] = [
                {**block, "text": marker("content", index, block["text"])}
                if isinstance(block.get("text"), str) and block["text"].strip()
                else block
                for block in content
            ]
        for key in REASONING:
            if isinstance(message.get(key), str) and message[key].strip():
                made[key] = marker(key, index, message[key])
            elif isinstance(message.get(key), list):
                made[key] = [_marked_thought(part, key, index, marker) for part in message[key]]
        if isinstance(message.get("name"), str) and message["name"]:
            known = message["name"] in names
            # a tool is named by the call before it
            made["name"] = name_of(message["name"]) if message.get("role") == "tool" or known else message["name"]
            if message.get("role") != "tool" and not known:
                made["name"] = marker("name", index, message["name"])
        if isinstance(message.get("tool_calls"), list):
            made["tool_calls"] = [_marked_call(call, index, name_of, pieces, marker) for call in message["tool_calls"]]
        if isinstance(message.get("function_call"), Mapping):
            call = {**message["function_call"], "name": marker("function_call", index, "function_call")}
            made["function_call"] = call
        made_messages.append(made)
    return (made_messages, marked_tools), pieces, of_tools


def _marked_thought(part, key: str, index: int, marker):
    """Return a part of a message's reasoning, which some give as a list of objects."""
    if not isinstance(part, Mapping):
        return part
    return {
        name: marker(key, index, value) if name in _OF_THOUGHTS and isinstance(value, str) and value.strip() else value
        for name, value in part.items()
    }


def _named(tool, name_of):
    if not isinstance(tool, Mapping):
        return tool
    if isinstance(tool.get("function"), Mapping) and isinstance(tool["function"].get("name"), str):
        return {**tool, "function": {**tool["function"], "name": name_of(tool["function"]["name"])}}
    return {**tool, "name": name_of(tool["name"])} if isinstance(tool.get("name"), str) else tool


def _marked_call(call, index: int, name_of, pieces: list, marker):
    if not isinstance(call, Mapping):
        return call
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return call
    name, arguments = name_of(function["name"]), function.get("arguments")
    pieces.append(Piece("tool calls", index, function["name"], name))

    def mark(value):
        if isinstance(value, str) and value.strip():
            return marker("arguments of tool calls", index, value)
        if isinstance(value, Mapping):
            return {key: mark(part) for key, part in value.items()}
        return [mark(item) for item in value] if isinstance(value, list) else value

    if isinstance(arguments, Mapping):
        arguments = mark(arguments)
    elif isinstance(arguments, str):
        try:
            arguments = json.dumps(mark(json.loads(arguments)))
        except ValueError:
            arguments = marker("arguments of tool calls", index, arguments)
    made = {**function, "name": name} | ({"arguments": arguments} if "arguments" in function else {})
    return {**call, "function": made} if "function" in call else made
