"""Nested values reach the chat template as the rows have them, whatever they were read from."""

import json

import pytest
from datasets import Dataset, Features, Json, List
from trl.trainer.utils import remove_none_values

from posttrain.data import formats, objects
from posttrain.data.pairs.loading import load_preferences
from posttrain.data.pairs.schema import examine_preferences
from posttrain.data.scored.loading import as_scored, load_scored
from posttrain.data.sources import read_rows
from posttrain.data.tasks.loading import load_demonstrations
from posttrain.data.tokens import sequences, tokenized_pairs
from posttrain.errors import DataError
from tests.data.conversations import trl_template

USER = [{"role": "user", "content": "Weather in Lyon?"}]
NO = [{"role": "assistant", "content": "No idea."}]


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}]


# tools and arguments of other keys, in other orders, of whole numbers beside broken ones, with nulls of their own
ROWS = [
    {
        "prompt": USER,
        "chosen": call("weather", town="Lyon", days=1),
        "rejected": NO,
        "tools": [tool("weather", town={"type": ["string", "null"], "default": None, "enum": ["Lyon", None]})],
    },
    {
        "prompt": USER,
        "chosen": call("add", right=2.5, left=[1, {"deep": {"er": None}}]),
        "rejected": call("weather", days=2, town="Nice"),
        "tools": [tool("add", left={"type": "number"}, right={"type": "number"}), tool("weather")],
    },
    {"prompt": USER, "chosen": NO, "rejected": call("now"), "tools": None},
]
# what of them Arrow can hold
PLAIN = [row | {"tools": row["tools"] and remove_none_values(row["tools"])} for row in ROWS]
PLAIN[1] = PLAIN[1] | {"chosen": call("add", right=2.5, left=3)}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def in_order(value) -> str:
    """As text, with the keys in their order and numbers of their kind."""
    return json.dumps(value)


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_file_of_json_comes_out_as_it_went_in_its_nulls_included(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_text(json.dumps(ROWS)) if kind == "json" else lines(path, ROWS)
    assert in_order(list(load_preferences(str(path)))) == in_order(ROWS)
    assert in_order(read_rows(str(path))[0]) == in_order(ROWS)


def test_scored_answers_and_tasks_come_out_as_they_went_in(tmp_path):
    rows = [{"prompt": USER, "completion": row["chosen"], "reward": 1.0, "tools": row["tools"]} for row in ROWS]
    assert in_order(list(load_scored(lines(tmp_path / "s.jsonl", rows)))) == in_order(rows)
    asked = [USER, *(USER + row["chosen"] + [{"role": "tool", "content": "mild"}] for row in ROWS)]
    tasks = [{"prompt": prompt, "demonstration": NO, "gold": "1"} for prompt in asked]
    assert in_order(list(load_demonstrations(lines(tmp_path / "t.jsonl", tasks)))) == in_order(tasks)


@pytest.mark.parametrize("kind", ["parquet", "saved", "hub folder"])
def test_what_arrow_stores_loses_what_arrow_filled_in(tmp_path, kind):
    data = Dataset.from_list(PLAIN)
    assert data[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"]["left"] is None
    if kind == "saved":
        data.save_to_disk(tmp_path / "a")
    else:
        (tmp_path / "a").mkdir()
        data.to_parquet(tmp_path / "a" / "a.parquet")
    source = str(tmp_path / "a" / "a.parquet" if kind == "parquet" else tmp_path / "a")
    for rows in (list(load_preferences(source)), read_rows(source)[0]):
        assert [row["tools"] for row in rows] == [row["tools"] for row in PLAIN]
        found = [row["chosen"][0]["tool_calls"][0]["function"]["arguments"] for row in rows[:2]]
        assert found[0] == {"town": "Lyon", "days": 1}
        assert found[1] == {"left": 3, "right": 2.5}


def test_json_features_keep_the_nulls_that_rows_had(tmp_path):
    kinds = {name: List(Json()) for name in ROWS[0]}
    data = Dataset.from_list(ROWS, features=Features(kinds))
    assert objects.restored(data) is data
    data.to_parquet(tmp_path / "a.parquet")
    assert in_order(list(load_preferences(str(tmp_path / "a.parquet")))) == in_order(ROWS)


def test_python_rows_can_be_stored_exactly():
    assert in_order(list(objects.exact(ROWS))) == in_order(ROWS)


def test_ordinary_rows_are_what_datasets_makes_of_them():
    rows = [{"prompt": USER, "chosen": NO, "rejected": NO, "flip_rate": 0.1}, {"prompt": USER, "chosen": NO}]
    exact, plain = objects.exact(rows), Dataset.from_list(rows)
    assert exact.features == plain.features
    assert list(exact) == list(plain)
    assert objects.restored(plain) is plain


def test_a_data_set_of_the_user_is_restored_in_every_check_and_keeps_its_fingerprint(fingerprints):
    data = Dataset.from_list(PLAIN)
    once, again = objects.restored(data), objects.restored(Dataset.from_list(PLAIN))
    assert once._fingerprint == again._fingerprint
    assert objects.restored(once) is once
    assert once.column_names == data.column_names
    scored = data.remove_columns("rejected").rename_column("chosen", "completion").add_column("reward", [0.0, 0.5, 1.0])
    assert "left" not in json.dumps(as_scored(scored, "train_dataset")[0])


def test_a_stream_is_restored_row_by_row():
    rows = list(objects.restored(Dataset.from_list(PLAIN).to_iterable_dataset()))
    assert [row["tools"] for row in rows] == [row["tools"] for row in PLAIN]


def test_null_for_template_settings_means_none(tokenizer):
    rows = [
        {"prompt": USER, "chosen": NO, "rejected": call("now"), "chat_template_kwargs": settings}
        for settings in ({"enable_thinking": False}, None, {"mark": True})
    ]
    data = objects.restored(Dataset.from_list(rows))
    assert data["chat_template_kwargs"][:] == [{"enable_thinking": False}, {}, {"mark": True}]
    assert len(list(tokenized_pairs(Dataset.from_list(rows), tokenizer))) == 3


def blocks(role, *texts):
    return [{"role": role, "content": [{"type": "text", "text": text} for text in texts]}]


def test_blocks_of_text_are_text(tokenizer, tmp_path):
    rows = [
        {"prompt": blocks("user", "Name ", "a river."), "chosen": blocks("assistant", "The Loire."), "rejected": NO},
        {"prompt": USER, "chosen": NO, "rejected": blocks("assistant", "Paris.")},
        {"prompt": blocks("system", "Be short.") + USER, "chosen": blocks("assistant"), "rejected": NO},
    ]
    expected = ["Name a river.", "Weather in Lyon?", "Be short."]
    loaded = load_preferences(lines(tmp_path / "a.jsonl", rows))
    assert [row["prompt"][0]["content"] for row in loaded] == expected
    assert loaded[2]["chosen"] == [{"role": "assistant", "content": ""}]
    tokens = list(tokenized_pairs(Dataset.from_list(rows, on_mixed_types="use_json"), tokenizer))
    assert "Name a river.<|im_end|>" in tokenizer.decode(tokens[0]["prompt_ids"])
    assert tokenizer.decode(tokens[0]["chosen_ids"]) == "The Loire.<|im_end|>"
    scored = [{"prompt": row["prompt"], "completion": row["chosen"], "reward": 1.0} for row in rows[:2]]
    assert load_scored(lines(tmp_path / "s.jsonl", scored))[0]["completion"][0]["content"] == "The Loire."
    tasks = [{"prompt": row["prompt"], "demonstration": NO, "gold": "1"} for row in rows]
    assert [row["prompt"][0]["content"] for row in load_demonstrations(lines(tmp_path / "t.jsonl", tasks))] == expected


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "What is this?"}, {"type": "image", "image": "a.png"}],
        [{"type": "text", "text": None}],
        [{"type": "tool_result", "text": "mild"}],
        ["a text"],
    ],
)
def test_other_blocks_stay(content):
    messages = [{"role": "user", "content": content}]
    assert objects.flattened(messages) is messages


def test_numbers_that_cannot_be_kept_are_refused_with_their_place():
    with pytest.raises(DataError, match="a.jsonl, line 2: tools holds a value that cannot be kept.*beyond 64 bits"):
        objects.exact([{"tools": [{"a": 1}]}, {"tools": [{"b": 2**70}]}], places=["a.jsonl, line 1", "a.jsonl, line 2"])


@pytest.mark.parametrize("text", ["a\u2028b", "a\u0085b", "a\u2029b\x0bc", "\ufeffa"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_unicode_line_separators_are_part_of_a_text(tmp_path, text, end):
    rows = [{"prompt": f"{i}{text}", "chosen": text, "rejected": "b"} for i in range(3)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert list(load_preferences(str(path))) == rows
    found, places = read_rows(str(path))
    assert found == rows
    assert places[2].endswith("line 3")


NO_CALLS = [{"tool_calls": []}, {"tool_calls": None}, {"function_call": None}, {"tool_calls": [], "function_call": {}}]


@pytest.mark.core("llama3_1-keys0", "gptoss")
@pytest.mark.parametrize(
    ("name", "keys"),
    [*(("llama3_1", keys) for keys in NO_CALLS), *((name, NO_CALLS[0]) for name in ("gptoss", "deepseekv3", "qwen3"))],
)
def test_an_empty_list_of_calls_is_none(tmp_path, keys, name):
    tokenizer = trl_template(name)
    answers = [{"role": "assistant", "content": text} for text in ("The Loire.", "Paris.")]
    plain = [{"prompt": USER, "chosen": [answers[0]], "rejected": [answers[1]]}] * 2
    rows = [row | {side: [row[side][0] | keys] for side in ("chosen", "rejected")} for row in plain]
    wanted = list(tokenized_pairs(Dataset.from_list(plain), tokenizer))
    for dataset in (Dataset.from_list(rows), objects.exact(rows), load_preferences(lines(tmp_path / "a.jsonl", rows))):
        assert list(tokenized_pairs(dataset, tokenizer)) == wanted
        assert (
            examine_preferences(dataset, tokenizer).warnings
            == examine_preferences(Dataset.from_list(plain), tokenizer).warnings
        )
    found = formats.detect(rows[0], rows[0])
    for with_keys, without in zip(
        sequences(rows[0], found, tokenizer), sequences(plain[0], found, tokenizer), strict=True
    ):
        assert with_keys == without


def test_calls_stay_and_rows_without_them_are_the_same_object():
    calling = call("now")
    assert objects.flattened(calling) is calling
    assert objects.flattened([{"role": "user", "content": "a", "tool_calls": []}]) == [{"role": "user", "content": "a"}]
    mixed = [*calling, {"role": "assistant", "content": "", "tool_calls": None}]
    assert objects.flattened(mixed) == [*calling, {"role": "assistant", "content": ""}]
