"""The columns tools and chat_template_kwargs: what is none, what is read, and what is refused with its row."""

import json

import pytest
from datasets import Dataset

from posttrain.data import formats
from posttrain.data.pairs.faults import scan_pairs
from posttrain.data.rendering import row_checks
from posttrain.data.row_options import tools_of
from posttrain.data.tokens import sequences, tokenized_pairs
from posttrain.errors import DataError

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TEMPLATE = (
    "{%- if tools -%}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{%- endif -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
ROW = {
    "prompt": [{"role": "user", "content": "Weather?"}],
    "chosen": [{"role": "assistant", "content": "Mild."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
NONE = ["", "  \n", "[]", "null", "{}", None]
ONE = [json.dumps([TOOL]), f" {json.dumps([TOOL])}\n", json.dumps(TOOL), json.dumps([json.dumps(TOOL)])]
BROKEN = ["{", "[1", "weather", "[{'type': 'function'}]"]


@pytest.fixture
def reader(tokenizer):
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("value", [*NONE, []])
def test_an_empty_column_of_tools_is_none(value, reader):
    assert tools_of({"tools": value}) is None
    rows = [ROW | {"tools": value}, ROW | {"tools": value if isinstance(value, list) else json.dumps([TOOL])}]
    data = Dataset.from_list(rows)
    bare, _ = tokenized_pairs(data, reader)
    assert bare == next(tokenized_pairs(Dataset.from_list([ROW]), reader))
    assert row_checks.check(data, reader, "data").warnings == []
    shown = sequences(rows[0], formats.detect(rows[0], rows[0]), reader)
    assert shown == sequences(ROW, formats.detect(ROW, ROW), reader)
    prompt = {"prompt": ROW["prompt"], "tools": value}
    (shown,) = sequences(prompt, formats.detect(prompt, prompt), reader)
    assert "weather" not in reader.decode(shown.ids)


@pytest.mark.parametrize("value", [*ONE, [json.dumps(TOOL)]])
def test_tools_as_json_texts_are_rendered_as_objects(value, reader):
    assert tools_of({"tools": value}) == [TOOL]
    data = Dataset.from_list([ROW | {"tools": value}])
    (row,) = tokenized_pairs(data, reader)
    assert json.dumps([TOOL]) in reader.decode(row["prompt_ids"])
    assert row_checks.check(data, reader, "data").warnings == []


@pytest.mark.parametrize("value", BROKEN)
def test_broken_tools_are_refused_with_column_and_row(value, reader):
    rows = [ROW | {"tools": ""}, ROW | {"tools": value}]
    for name in ("prompt", "completion", "messages"):
        kept = {"prompt": ROW["prompt"], "completion": ROW["chosen"], "messages": ROW["prompt"] + ROW["chosen"]}
        kept = {name: kept[name]} | ({"prompt": ROW["prompt"]} if name == "completion" else {})
        with pytest.raises(DataError, match="data, row 2: the column tools holds"):
            row_checks.check(Dataset.from_list([kept | {"tools": row["tools"]} for row in rows]), reader, "data")
    with pytest.raises(DataError, match="data, row 2: the column tools holds"):
        row_checks.check(Dataset.from_list(rows), reader, "data")
    with pytest.raises(DataError, match="a.jsonl, line 7: the column tools holds"):
        sequences(rows[1], formats.detect(ROW, ROW), reader, "a.jsonl, line 7")


@pytest.mark.parametrize("settings", [[None, {"a": True}], [{"a": True}, None], [None, None], [{}, None]])
def test_null_settings_of_the_template_are_none(settings, reader):
    rows = [ROW | {"chat_template_kwargs": value} for value in settings]
    counts, warnings = scan_pairs([(f"row {i}", row) for i, row in enumerate(rows)], "data")
    assert counts == {"rows": 2}
    assert warnings == []
    for row in rows:
        assert sequences(row, formats.detect(row, row), reader) == sequences(ROW, formats.detect(ROW, ROW), reader)
    (plain,) = tokenized_pairs(Dataset.from_list([ROW]), reader)
    assert list(tokenized_pairs(Dataset.from_list(rows), reader)) == [plain, plain]


@pytest.mark.parametrize("content", ["", " ", None])
def test_a_call_in_the_old_key_is_named_with_the_new_one(content):
    call = {"role": "assistant", "content": content, "function_call": {"name": "w", "arguments": "{}"}}
    with pytest.raises(DataError, match=r"function_call.*tool_calls"):
        scan_pairs([("row 1", ROW | {"chosen": [call]})], "data")
    if content is not None:
        counts, (warning,) = scan_pairs([("row 1", ROW | {"rejected": [call]}), ("row 2", ROW)], "data")
        assert counts["function_call"] == 1
        assert counts["empty"] == 0
        assert "1 of 2 pairs have an answer that is a call in the key function_call" in warning
