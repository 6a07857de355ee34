"""Columns beside the conversation: a system message, scores of the sides, and those that are left out."""

import json

import pytest
from datasets import Dataset

from posttrain.data import columns
from posttrain.data.columns import log_left_out_columns, place_system, system_in_front
from posttrain.data.corruption import flip_preferences
from posttrain.data.pairs import sides
from posttrain.data.pairs.loading import load_preferences
from posttrain.data.scored.loading import as_scored, load_scored
from posttrain.data.tasks.loading import load_demonstrations
from posttrain.errors import DataError

USER = [{"role": "user", "content": "q"}]
SYSTEM = {"role": "system", "content": "Be short."}
ANSWER = [{"role": "assistant", "content": "a"}]
OTHER = [{"role": "assistant", "content": "b"}]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_system_column_stands_in_front_of_loaded_pairs(tmp_path, column, suffix):
    rows = [{column: text, "prompt": USER, "chosen": ANSWER, "rejected": OTHER} for text in ("Be short.", "", None)]
    source = str(tmp_path / f"a.{suffix}")
    if suffix == "jsonl":
        write(tmp_path / "a.jsonl", *rows)
    else:
        Dataset.from_list(rows).to_parquet(source)
    found = load_preferences(source)
    assert found["prompt"][:] == [[SYSTEM, *USER], USER, USER]
    assert column not in found.column_names


def test_a_system_column_stands_in_front_of_both_sides_where_they_hold_the_prompt(tmp_path):
    row = {"system": "Be short.", "chosen": USER + ANSWER, "rejected": USER + OTHER}
    assert load_preferences(write(tmp_path / "a.jsonl", row)).to_list() == [
        {"chosen": [SYSTEM, *USER, *ANSWER], "rejected": [SYSTEM, *USER, *OTHER]}
    ]


def test_a_system_column_stands_in_front_of_scored_answers_and_tasks(tmp_path):
    row = {"system": "Be short.", "prompt": USER, "completion": ANSWER, "reward": 1.0}
    assert load_scored(write(tmp_path / "a.jsonl", row))[0]["prompt"] == [SYSTEM, *USER]
    assert as_scored(Dataset.from_list([row]), "d")[0]["prompt"] == [SYSTEM, *USER]
    pair = {"system": "Be short.", "prompt": USER, "chosen": ANSWER, "rejected": OTHER}
    scored = as_scored(Dataset.from_list([pair | {"score_chosen": 1.0, "score_rejected": 0.0}]), "d")
    assert scored["prompt"][:] == [[SYSTEM, *USER]] * 2
    task = {"system": "Be short.", "prompt": USER, "demonstration": ANSWER, "gold": "1"}
    assert load_demonstrations(write(tmp_path / "b.jsonl", task))[0]["prompt"] == [SYSTEM, *USER]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"system": "Be short.", "prompt": [SYSTEM, *USER]}, None),
        ({"system": "  ", "prompt": USER}, None),
        ({"system": "Be short.", "prompt": "a text"}, None),
        ({"system": "Be short.", "prompt": USER}, [SYSTEM, *USER]),
        (
            {"system": "Be short.", "prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
            [
                {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
            ],
        ),
    ],
)
def test_a_system_message_is_placed_once(row, prompt):
    assert system_in_front(row, "row 1").get("prompt") == prompt


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"system": "Be long.", "prompt": [SYSTEM, *USER]}, "prompt begins with another one"),
        ({"system": ["Be long."], "prompt": USER}, "system is of type list; it must be a text"),
    ],
)
def test_a_system_message_that_cannot_be_placed_is_refused(row, problem):
    with pytest.raises(DataError, match=f"row 1: .*{problem}"):
        system_in_front(row, "row 1")


def test_placing_twice_changes_nothing_and_without_a_column_the_data_set_is_the_same():
    plain = Dataset.from_list([{"prompt": USER}])
    assert place_system(plain, "d") is plain
    once = place_system(Dataset.from_list([{"system": "Be short.", "prompt": USER}]), "d")
    assert place_system(once, "d").to_list() == once.to_list()
    assert once["prompt"][0] == [SYSTEM, *USER]


def test_streams_and_several_data_sets_get_their_system_messages():
    rows = Dataset.from_list([{"system": "Be short.", "prompt": USER}])
    stream = columns.prepare({"a": rows.to_iterable_dataset(), "b": rows}, "eval_dataset")
    assert next(iter(stream["a"]))["prompt"] == stream["b"][0]["prompt"] == [SYSTEM, *USER]
    assert columns.prepare(None, "eval_dataset") is None


def test_a_system_message_of_texts_is_said_to_be_left_out(tmp_path, logged):
    row = {"system": "Be short.", "prompt": "q", "chosen": "a", "rejected": "b"}
    assert load_preferences(write(tmp_path / "a.jsonl", row)).to_list() == [
        {"prompt": "q", "chosen": "a", "rejected": "b"}
    ]
    assert "the column system is left out: a text has no place for a system message" in logged.text
    logged.clear()
    load_scored(write(tmp_path / "b.jsonl", {"system": "s", "prompt": "q", "completion": "a", "reward": 1}))
    load_demonstrations(
        write(tmp_path / "c.jsonl", {"system": "s", "problem": "q", "solution": "#### 1"}), conversational=False
    )
    assert logged.text.count("the column system is left out") == 2


def test_columns_that_are_left_out_under_a_known_name_are_said(tmp_path, logged):
    logged.set_level("INFO", logger="posttrain")
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "history": "h", "margin": 1.0, "source": "s"}
    load_preferences(write(tmp_path / "a.jsonl", row))
    assert "left out: columns history, margin, though each has a name that known formats use" in logged.text
    logged.clear()
    load_scored(
        write(tmp_path / "b.jsonl", {"prompt": "q", "completion": "a", "reward": 1, "answer": "x", "label": True})
    )
    assert "left out: column answer, though it has" in logged.text
    logged.clear()
    load_demonstrations(write(tmp_path / "c.jsonl", {"problem": "q", "solution": "#### 1", "messages": USER}))
    assert "left out: column messages" in logged.text
    logged.clear()
    assert (
        log_left_out_columns(
            ["prompt", "chosen", "rejected", "source", "system"], ["prompt", "chosen", "rejected"], "d"
        )
        == []
    )
    assert logged.text == ""


@pytest.mark.parametrize(
    "column",
    [
        "context",
        "passage",
        "choices",
        "options",
        "persona",
        "document",
        "article",
        "background",
        "premise",
        "system_message",
        "sys_prompt",
    ],
)
def test_what_a_question_is_about_is_said_to_be_left_out(tmp_path, column, logged):
    logged.set_level("INFO", logger="posttrain")
    said = f"left out: column {column}, though it has a name that known formats use"
    beside = {column: "x", "source": "s", "category": "c"}
    pair, task = {"chosen": "c", "rejected": "r"}, {"question": "q", "answer": "so #### 4"}
    for number, (load, row) in enumerate(
        [
            (load_preferences, {"instruction": "q"} | pair),
            (load_preferences, {"question": "q"} | pair),
            (load_preferences, {"prompt": "q"} | pair),
            (load_demonstrations, task),
            (load_scored, {"instruction": "q", "output": "a", "reward": 1.0}),
        ]
    ):
        logged.clear()
        if load is load_scored:
            row = {"prompt": row.pop("instruction"), "completion": row.pop("output")} | row
        load(write(tmp_path / f"{number}.jsonl", row | beside))
        assert said in logged.text, row
    logged.clear()
    at_hand = Dataset.from_list([{"prompt": "q"} | pair | beside])
    columns.prepare(at_hand, "train_dataset", ("prompt", "chosen", "rejected"))
    assert f"train_dataset: {said}" in logged.text


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen_reward", "rejected_reward"),
        ("chosen-rating", "rejected-rating"),
        ("rating_chosen", "rating_rejected"),
        ("chosenModel", "rejectedModel"),
        ("metaChosen", "metaRejected"),
    ],
)
def test_what_belongs_to_a_side_goes_with_it(name, other):
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", name: 9.0, other: 2.0, "id": 1}
    flipped = flip_preferences(Dataset.from_list([row] * 4), 0.5)
    for found in flipped:
        assert (found[name], found[other]) == ((2.0, 9.0) if found["flipped"] else (9.0, 2.0))
        assert found["id"] == 1


@pytest.mark.parametrize(
    ("columns", "swapped"),
    [
        ({"scores": [9, 2]}, {"scores": [2, 9]}),
        ({"rating": [9.0, 2.0]}, {"rating": [2.0, 9.0]}),
        ({"judge_ratings": [5, 1]}, {"judge_ratings": [1, 5]}),
        # the order is the answers' own, which `order` tells
        (
            {"generations": ["bad", "good"], "rating": [2, 9], "order": ["rejected", "chosen"]},
            {"generations": ["bad", "good"], "rating": [2, 9], "order": ["chosen", "rejected"]},
        ),
        ({"scores": [9, 2, 4]}, {"scores": [9, 2, 4]}),
        ({"tokens": [9, 2]}, {"tokens": [9, 2]}),
        ({"margin": 7.0}, {"margin": -7.0}),
        ({"score_diff": 3, "delta": 0}, {"score_diff": -3, "delta": 0}),
        ({"marginal": 3}, {"marginal": 3}),
        ({"margin": True}, {"margin": True}),
        ({"meta": {"chosen_by": "a", "rejected_by": "b"}}, {"meta": {"chosen_by": "b", "rejected_by": "a"}}),
        ({"scores": {"chosen": 9, "rejected": 2}}, {"scores": {"chosen": 2, "rejected": 9}}),
        ({"chosen_only": 3}, {"chosen_only": 3}),
    ],
)
def test_lists_margins_and_objects_of_both_sides_are_turned(columns, swapped):
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", **columns}
    assert sides.swapped(row) == {"prompt": "q", "chosen": "bad", "rejected": "good", **swapped}
    assert sides.swapped(sides.swapped(row)) == row


def test_the_command_swaps_lists_and_margins_too(tmp_path, capsys):
    from posttrain.cli import main

    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "scores": [9, 2], "margin": 7, "chosen-rating": None}
    source = write(tmp_path / "a.jsonl", *[row | {"rejected-rating": 3}] * 2)
    assert main(["data", "flip", source, str(tmp_path / "b.jsonl"), "--rate", "0.5"]) == 0
    for line in (tmp_path / "b.jsonl").read_text().splitlines():
        found = json.loads(line)
        right = ([2, 9], -7, 3, None) if found["flipped"] else ([9, 2], 7, None, 3)
        assert (found["scores"], found["margin"], found["chosen-rating"], found["rejected-rating"]) == right
