"""Messages that stand in a row as JSON text are messages, and an open turn at the end of a prompt is none."""

import json

import pytest
from datasets import Dataset, IterableDataset

from posttrain.cli import main
from posttrain.data import columns, objects, turns
from posttrain.data.pairs.loading import load_preferences
from posttrain.data.scored.loading import as_scored, load_scored
from posttrain.data.tasks.loading import load_demonstrations
from posttrain.errors import DataError

ASKED = [{"role": "user", "content": "Name a river."}]
LOIRE, PARIS = [{"role": "assistant", "content": "The Loire."}], [{"role": "assistant", "content": "Paris."}]
PAIR = {"prompt": ASKED, "chosen": LOIRE, "rejected": PARIS}
OPEN = [
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": None},
    {"role": "assistant", "content": " \n"},
    {"role": "assistant", "content": []},
    {"role": "assistant", "content": [{"type": "text", "text": ""}]},
    {"role": "assistant", "content": "", "tool_calls": []},
]


def texts(row, write=json.dumps):
    return {name: write(value) if isinstance(value, list) else value for name, value in row.items()}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def with_open(row, turn):
    return {**row, "prompt": [*row["prompt"], turn]}


def scored(row):
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "reward": 1.0},
        {"prompt": row["prompt"], "completion": row["rejected"], "reward": 0.0},
    ]


@pytest.mark.parametrize("given", [texts(PAIR), with_open(PAIR, OPEN[0]), texts(with_open(PAIR, OPEN[1]))])
def test_every_loader_reads_them_as_messages(given, tmp_path):
    assert load_preferences(write(tmp_path / "a.jsonl", given, given)).to_list() == [PAIR, PAIR]
    assert load_preferences(write(tmp_path / "a.jsonl", given, given), limit=1).to_list() == [PAIR]
    Dataset.from_list([texts(given)]).to_parquet(tmp_path / "a.parquet")
    assert load_preferences(str(tmp_path / "a.parquet")).to_list() == [PAIR]
    made = load_scored(write(tmp_path / "b.jsonl", *scored(given)))
    assert made.to_list() == scored(PAIR)
    renamed = [{"asked": row["prompt"], "said": row["completion"], "score": row["reward"]} for row in scored(given)]
    names = {"asked": "prompt", "said": "completion", "score": "reward"}
    assert load_scored(write(tmp_path / "c.jsonl", *renamed), columns=names).to_list() == scored(PAIR)
    task = {"q": given["prompt"], "a": given["chosen"], "g": "1"}
    names = {"prompt": "q", "demonstration": "a", "gold": "g"}
    (read,) = load_demonstrations(write(tmp_path / "d.jsonl", task), columns=names).to_list()
    assert read == {"prompt": ASKED, "demonstration": LOIRE, "gold": "1"}


@pytest.mark.parametrize("given", [texts(PAIR), with_open(PAIR, OPEN[0]), texts(with_open(PAIR, OPEN[1]))])
def test_data_sets_at_hand_and_streams_are_read_alike(given):
    rows = [given, {**given, "margin": 1.0}]
    made = columns.prepare(objects.exact(rows), "data")
    assert made.column_names == ["prompt", "chosen", "rejected", "margin"] and made["margin"][:] == [None, 1.0]
    assert made.remove_columns("margin").to_list() == [PAIR, PAIR]
    stream = columns.prepare(IterableDataset.from_generator(lambda: iter(rows)), "data")
    assert [{name: row[name] for name in PAIR} for row in stream] == [PAIR, PAIR]
    assert as_scored(objects.exact(scored(given)), "data").to_list() == scored(PAIR)


@pytest.mark.parametrize("turn", OPEN)
def test_an_open_turn_is_left_out_and_counted(turn, logged):
    logged.set_level("INFO", logger="posttrain")
    rows = [with_open(PAIR, turn), PAIR, with_open(with_open(PAIR, turn), OPEN[0])]
    made = columns.prepare(objects.exact(rows), "data")
    assert made["prompt"][:] == [ASKED] * 3
    (line,) = [line for line in logged.messages if "empty turn" in line]
    assert line.startswith("data: 2 prompts end with an empty turn of the assistant, which is left out")
    assert "first: data, row 1" in line


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "The"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "assistant", "content": "", "reasoning_content": "Hm."},
        {"role": "assistant", "content": [{"type": "image"}]},
        {"role": "user", "content": ""},
        {"role": "tool", "content": ""},
    ],
)
def test_a_turn_that_says_something_or_is_anothers_stays(turn):
    assert turns.without_open_turn([*ASKED, turn]) == [*ASKED, turn]
    plain = [*ASKED, turn]
    assert turns.without_open_turn(plain) is plain


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "[1] What is it?", "chosen": "[1]", "rejected": "[]"},
        {"prompt": "Write JSON.", "chosen": '[{"a": 1}]', "rejected": "[{"},
        {"prompt": "Write a chat.", "chosen": json.dumps(ASKED + LOIRE), "rejected": json.dumps(ASKED + PARIS)},
        {"prompt": "[INST] Hi [/INST]", "chosen": "[{'town': 'Lyon'}]", "rejected": "[{'role"},
        {"prompt": '[{"town": "Lyon"', "chosen": "a", "rejected": "b"},
    ],
)
def test_texts_that_only_begin_so_stay_texts(row):
    data = Dataset.from_list([row] * 2)
    assert turns.read(data, "data") is data


def test_one_text_among_many_that_looks_so_stays_a_text():
    rows = [{"prompt": "Print it.", "chosen": "a", "rejected": "b"}] * 3
    for odd in (repr(LOIRE), json.dumps(LOIRE)):
        data = Dataset.from_list([{**rows[0], "chosen": odd}, *rows])
        assert columns.prepare(data, "data")["chosen"][:] == [odd, "a", "a", "a"]


def as_numpy(value):
    return repr(value).replace("}, {", "}\n {")


def cut(value):
    return json.dumps(value)[:-2]


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("printed", [repr, as_numpy, cut])
def test_a_list_that_python_printed_is_refused_with_its_place(column, printed, tmp_path):
    row = {**PAIR, "prompt": [{"role": "system", "content": "Be short."}, *ASKED]}
    row = texts(row) | {column: printed(row[column])}
    remedy = "row 1: " + column + " is the text .* begins like a list of messages and is no JSON.*json.dumps"
    with pytest.raises(DataError, match=remedy):
        columns.prepare(Dataset.from_list([row] * 2), "data")
    with pytest.raises(DataError, match=remedy.replace("row", "line")):
        load_preferences(write(tmp_path / "a.jsonl", row))


def test_a_text_among_messages_is_refused_with_its_place():
    rows = [texts(PAIR), texts(PAIR), {**texts(PAIR), "chosen": "The Loire."}]
    with pytest.raises(DataError, match="data, row 3: chosen is the text 'The Loire.', and in other rows it is the JS"):
        columns.prepare(Dataset.from_list(rows), "data")


def test_turns_of_from_and_value_are_read_as_well(tmp_path):
    said = {"prompt": [{"from": "human", "value": "Name a river."}]}
    said |= {name: [{"from": "gpt", "value": PAIR[name][0]["content"]}] for name in ("chosen", "rejected")}
    assert load_preferences(write(tmp_path / "a.jsonl", texts(said))).to_list() == [PAIR]
    talk = [{"from": "human", "value": "Name a river."}, {"from": "gpt", "value": ""}]
    row = {"conversations": talk, "chosen": said["chosen"][0], "rejected": said["rejected"][0]}
    for given in (row, texts(row)):
        assert load_preferences(write(tmp_path / "b.jsonl", given)).to_list() == [PAIR]


def test_whole_conversations_as_json_are_of_their_published_shape(tmp_path):
    row = {"prompt": "Name a river.", "chosen": ASKED + LOIRE, "rejected": ASKED + PARIS}
    assert load_preferences(write(tmp_path / "a.jsonl", texts(row))).to_list() == [PAIR]
    del row["prompt"]
    assert columns.prepare(Dataset.from_list([texts(row)]), "data").to_list() == [row]


def test_inspect_and_convert_show_the_messages(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", *[texts(with_open(PAIR, OPEN[0]))] * 2)
    assert main(["data", "inspect", source, "--model", "embedded:tiny"]) == 0
    shown = capsys.readouterr()
    assert "conversational preference" in shown.out and shown.out.count("assistant\n") == 2
    row = {"prompt": "Name a river.", "chosen": ASKED + LOIRE, "rejected": ASKED + PARIS}
    source = write(tmp_path / "b.jsonl", texts(row))
    assert main(["data", "convert", source, str(tmp_path / "c.jsonl")]) == 0
    assert json.loads((tmp_path / "c.jsonl").read_text()) == PAIR


@pytest.mark.parametrize("empty", [{"images": []}, {"image": None}, {"images": None, "image": None}])
def test_a_column_of_images_that_is_empty_throughout_is_left_out(empty, logged):
    logged.set_level("INFO", logger="posttrain")
    made = columns.prepare(Dataset.from_list([{**PAIR, **empty}] * 2), "data")
    assert made.to_list() == [PAIR, PAIR]
    assert any(line.startswith("data: left out: column image") for line in logged.messages)
    rows = [{**row, **empty} for row in scored(PAIR)]
    assert as_scored(Dataset.from_list(rows), "data").to_list() == scored(PAIR)


def test_a_column_that_has_an_image_stays():
    data = Dataset.from_list([{**PAIR, "images": []}, {**PAIR, "images": ["a.png"]}])
    assert columns.prepare(data, "data").column_names == [*PAIR, "images"]
