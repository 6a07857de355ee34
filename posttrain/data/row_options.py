"""What a row gives the chat template beside its texts: its tools, and its settings."""

import json
from collections.abc import Mapping

from posttrain.data import objects
from posttrain.errors import DataError

# Arguments of `apply_chat_template` that training gives
_NO_SETTINGS = (
    *("add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "return_tensors", "padding"),
    *("return_assistant_tokens_mask", "truncation", "max_length", "tokenizer", "processing_class", "tools"),
    *("conversation", "messages"),
)


def tools_of(row: Mapping, place: str = "the row") -> list | None:
    """Return the tools of a row, which a column may hold as JSON text, or as a list of JSON texts.

    None where it has none.

    A blank text, null and an empty list are none. Raises DataError with `place` for a text that is no JSON, and for
    tools that are no objects.
    """
    tools = _read_json(row.get("tools"), place)
    if not tools:
        return None
    tools = [tools] if isinstance(tools, Mapping) else tools
    read = [_read_json(tool, place) for tool in tools] if isinstance(tools, list) else [tools]
    others = [tool for tool in read if not isinstance(tool, Mapping)]
    if others:
        raise DataError(
            f"{place}: the column tools holds {str(others[0])[:60]!r}, which is no tool; each is an object such as "
            '{"type": "function", "function": {"name": ..., "parameters": ...}}. Mend it, or leave it empty.'
        )
    return read


def _read_json(value, place: str):
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise DataError(
            f"{place}: the column tools holds {value[:60]!r}, which is no JSON ({error}). Mend it, or leave it empty "
            "for none."
        ) from None


def with_read_tools(dataset, name: str):
    """Return a data set whose column `tools` TRL can read: blank texts are null, and lists of texts are one text."""
    features = dataset.features or {}
    for column in ("tools", "chat_template_kwargs"):
        if getattr(features.get(column), "dtype", None) == "null":
            dataset = dataset.remove_columns(column)
    if "tools" not in objects.names_of(dataset):
        return dataset
    if not hasattr(dataset, "__len__"):
        return dataset.map(_read_tools)
    if dataset.format["type"] == "custom":
        return dataset
    given, prefix = dataset.with_format(None)["tools"][:], f"{name}, " if name else ""
    made = [_read_tools({"tools": value}, f"{prefix}row {number}")["tools"] for number, value in enumerate(given, 1)]
    if made == given:
        return dataset
    form = dataset.format
    dataset = dataset.with_format(None).remove_columns("tools")
    if any(value is not None for value in made):
        dataset = dataset.add_column("tools", made)
    return dataset.with_format(form["type"], **form["format_kwargs"])


def _read_tools(row: Mapping, place: str = "a row") -> dict:
    value = row["tools"]
    texts = isinstance(value, list) and value and all(isinstance(tool, str) for tool in value)
    if not isinstance(value, str) and not texts:
        return {"tools": value}
    tools = tools_of(row, place)
    if isinstance(value, str) and tools and tools == json.loads(value):
        return {"tools": value}
    return {"tools": json.dumps(tools) if tools else None}


def check_settings(settings: Mapping | None, place: str) -> None:
    """Raise DataError for settings of the chat template that are arguments of its call."""
    settings = settings if isinstance(settings, Mapping) else {}
    given = [name for name, value in settings.items() if name in _NO_SETTINGS and value is not None]
    if given:
        remedy = "Give tools in a column of their own." if "tools" in given else "Leave it out."
        raise DataError(
            f"{place}: chat_template_kwargs holds {given[0]}, which is no setting of a chat template: training sets it "
            f"itself. {remedy}"
        )


def template_kwargs_of(row: Mapping) -> dict:
    """Return the settings of the chat template in a row's column chat_template_kwargs, without those that are null."""
    return {name: value for name, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}
