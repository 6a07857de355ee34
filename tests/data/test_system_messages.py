"""A row's system message stands in front of its conversation once, whatever kind of row it is."""

import json

import pytest
from datasets import Dataset, IterableDataset

from posttrain.cli import main
from posttrain.data import columns, formats, objects
from posttrain.data.pairs.loading import load_preferences
from posttrain.data.scored.loading import load_scored
from posttrain.errors import DataError

SYSTEM = {"role": "system", "content": "Be short."}
USER = {"role": "user", "content": "q"}
ANSWER, OTHER = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
ASKED = {"from": "human", "value": "q"}
SAID, WORSE = {"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}
WITHIN = {"from": "system", "value": "Be short."}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("own", [False, True])
def test_sharegpt_pairs_of_whole_conversations_keep_their_system_message(tmp_path, column, own):
    begin = [WITHIN] * own
    row = {column: "Be short.", "chosen": [*begin, ASKED, SAID], "rejected": [*begin, ASKED, WORSE]}
    right = {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]}
    assert load_preferences(write(tmp_path / "a.jsonl", row, row)).to_list() == [right, right]
    assert formats.convert(Dataset.from_list([row]))[0] == right
    scores = {"chosen_reward": 2.0, "rejected_reward": 1.0}
    scored = load_scored(write(tmp_path / "b.jsonl", row | scores))
    assert scored["prompt"][:] == [[SYSTEM, USER]] * 2 and scored["completion"][:] == [[ANSWER], [OTHER]]


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("within", [[], [WITHIN], [{"from": "system", "value": " Be short.\n"}]])
def test_sharegpt_conversations_get_a_system_message_once(tmp_path, column, within):
    row = {column: "Be short.", "conversations": [*within, ASKED], "chosen": SAID, "rejected": WORSE}
    made = load_preferences(write(tmp_path / "a.jsonl", row))[0]
    assert [turn["content"].strip() for turn in made["prompt"]] == ["Be short.", "q"]
    talk = Dataset.from_list([{column: "Be short.", "conversations": [*within, ASKED, SAID]}])
    assert [turn["role"] for turn in formats.convert(talk)[0]["messages"]] == ["system", "user", "assistant"]


def test_two_different_system_messages_are_refused_with_their_row(tmp_path, capsys):
    good = {"system": "Be short.", "conversations": [ASKED], "chosen": SAID, "rejected": WORSE}
    other = good | {"conversations": [{"from": "system", "value": "Be long."}, ASKED]}
    source = write(tmp_path / "a.jsonl", good, other)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the column system holds .* begins with another one"):
        load_preferences(source)
    whole = {"system": "Be long.", "chosen": [WITHIN, ASKED, SAID], "rejected": [WITHIN, ASKED, WORSE]}
    with pytest.raises(DataError, match="line 1: the column system holds a system message, and chosen begins with"):
        load_preferences(write(tmp_path / "b.jsonl", whole))
    with pytest.raises(DataError, match="row 1: the column system .* the conversation begins with another one"):
        formats.convert(Dataset.from_list([{"system": "Be long.", "conversations": [WITHIN, ASKED, SAID]}]))
    assert main(["data", "convert", source, str(tmp_path / "c.jsonl")]) == 3
    assert "line 2: the column system holds" in capsys.readouterr().err


@pytest.mark.parametrize("system", ["", "  ", None])
def test_an_empty_system_message_is_none(system):
    row = {"system": system, "instruction": "q", "output": "a"}
    assert formats.convert_row(row, formats.detect(row, row))["prompt"] == [USER]
    row = {"system": system, "chosen": [ASKED, SAID], "rejected": [ASKED, WORSE]}
    assert formats.convert_row(row, formats.detect(row, row))["chosen"] == [USER, ANSWER]


def test_a_system_message_that_is_no_text_is_refused_in_every_kind_of_row():
    for row in (
        {"instruction": "q", "chosen": "a", "rejected": "b"},
        {"conversations": [ASKED], "chosen": SAID, "rejected": WORSE},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, WORSE]},
    ):
        with pytest.raises(DataError, match="line 4: system is of type list"):
            formats.convert_row({"system": ["s"], **row}, formats.detect(row, row), "line 4")


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be short.", "prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"system_prompt": "Be short.", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"system": "Be short.", "prompt": [USER], "gold": "1"},
    ],
)
def test_a_stream_that_does_not_know_its_columns_gets_its_system_messages(row, logged):
    logged.set_level("INFO", logger="posttrain")

    def rows():
        yield from [row, row]

    stream = IterableDataset.from_generator(rows)
    assert stream.column_names is None and objects.names_of(stream) == list(row)
    made = list(columns.prepare(stream, "train_dataset", ("prompt", "chosen", "rejected")))
    known = list(columns.prepare(Dataset.from_list([row, row]).to_iterable_dataset(), "train_dataset"))
    assert made == known and len(made) == 2
    parts = ["prompt"] if "prompt" in row else ["chosen", "rejected"]
    assert all(one[part][0] == SYSTEM for one in made for part in parts)
    assert ("left out: column gold" in logged.text) == ("gold" in row)


def test_what_is_no_data_set_and_an_empty_stream_have_no_columns():
    assert objects.names_of(None) == objects.names_of([{"a": 1}]) == []
    assert objects.names_of(IterableDataset.from_generator(lambda: iter(()))) == []
    assert objects.names_of(Dataset.from_dict({"a": [1]})) == ["a"]


def test_rows_that_are_yet_to_be_converted_are_not_said_to_lose_their_system_message(logged):
    row = {"system": "Be short.", "chosen": [ASKED, SAID], "rejected": [ASKED, WORSE]}
    rows = Dataset.from_list([row])
    assert columns.prepare(rows, "train_dataset", ("chosen", "rejected")) is rows
    assert "left out: a text has no place" not in logged.text
