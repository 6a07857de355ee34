import json
import re

import pytest
from datasets import Dataset

from posttrain.cli import main
from posttrain.data.formats import convert, convert_row, detect
from posttrain.data.pairs.loading import load_preferences
from posttrain.errors import DataError

USER = [{"role": "user", "content": "q"}]
ANSWER = [{"role": "assistant", "content": "a"}]
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("row", "expected", "why"),
    [
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "standard preference",
            "prompt, chosen and rejected, of texts",
        ),
        (
            {"prompt": USER, "chosen": ANSWER, "rejected": ANSWER, "score": 1},
            "conversational preference",
            "prompt, chosen and rejected, of lists of messages with role and content",
        ),
        ({"chosen": "qa", "rejected": "qb"}, "standard preference with implicit prompt", "columns chosen and rejected"),
        (
            {"chosen": USER + ANSWER, "rejected": USER + ANSWER},
            "conversational preference with implicit prompt",
            "columns chosen and rejected, of lists",
        ),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, "tokenised preference", "columns prompt_ids,"),
        ({"prompt": "q", "completion": "a", "label": True}, "standard unpaired preference", "completion and label"),
        ({"prompt": USER, "completion": ANSWER}, "conversational prompt-completion", "prompt and completion"),
        ({"prompt": USER}, "conversational prompt-only", "column prompt, of lists of messages"),
        ({"messages": USER + ANSWER}, "conversational language modelling", "column messages"),
        ({"conversations": USER + ANSWER}, "conversational language modelling", "column conversations"),
        ({"text": "t"}, "standard language modelling", "column text, of texts"),
        ({"instruction": "i", "input": "", "output": "o"}, "standard alpaca", "instruction, input and output"),
        ({"instruction": "i", "output": "o"}, "standard alpaca", "instruction and output"),
        ({"instruction": "i", "chosen": "a", "rejected": "b"}, "standard alpaca preference", "instruction, chosen and"),
        ({"conversations": TURNS}, "conversational sharegpt", "column conversations, of turns with from and value"),
        (
            {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]},
            "conversational sharegpt preference",
            "chosen and rejected, of turns with from and value",
        ),
        ({"question": "q", "answer": "a"}, "unknown", "the known columns are prompt with chosen and rejected"),
    ],
)
def test_a_row_says_which_kind_of_data_it_is_of_and_why(row, expected, why):
    found = detect(list(row), row)
    assert str(found) == expected
    assert why in found.why


def test_without_a_row_the_columns_alone_are_judged():
    assert str(detect(["prompt", "chosen", "rejected"])) == "standard preference"
    assert detect([]).kind == "unknown"


def converted(row):
    return convert(Dataset.from_list([row]))[0]


def test_alpaca_becomes_messages_and_keeps_columns_that_take_no_part():
    row = {"instruction": "Add.", "input": "2 3", "output": "5", "system": "Be brief.", "source": "s"}
    assert converted(row) == {
        "source": "s",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add.\n2 3"}],
        "completion": [{"role": "assistant", "content": "5"}],
    }
    pair = converted({"instruction": "Add.", "history": [["1 1", "2"]], "chosen": "5", "rejected": "6"})
    assert [message["content"] for message in pair["prompt"]] == ["1 1", "2", "Add."]
    assert (pair["chosen"], pair["rejected"]) == (
        [{"role": "assistant", "content": "5"}],
        [{"role": "assistant", "content": "6"}],
    )


def test_sharegpt_becomes_messages_or_preference_pairs():
    assert converted({"conversations": TURNS}) == {"messages": USER + ANSWER}
    other = {"from": "gpt", "value": "b"}
    pair = converted({"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": other})
    assert pair == {"prompt": USER, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "b"}]}
    implicit = converted({"chosen": TURNS, "rejected": [TURNS[0], other]})
    assert implicit["chosen"] == USER + ANSWER and "prompt" not in implicit


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("train", False), ("mask", True)])
def test_a_turn_of_sharegpt_keeps_a_mark_of_not_being_learned(key, value):
    made = converted({"conversations": [*TURNS, {**TURNS[1], key: value}]})
    assert [message.get(key) for message in made["messages"]] == [None, None, value]
    kept = converted({"conversations": [TURNS[0], {**TURNS[1], "weight": 1, "id": 7}]})
    assert kept == {"messages": USER + ANSWER}


def test_an_unknown_speaker_is_named_with_its_row():
    rows = [{"conversations": TURNS}, {"conversations": [{"from": "narrator", "value": "x"}]}]
    with pytest.raises(DataError, match="row 2: the turn's speaker is 'narrator'; .* human, gpt"):
        convert(Dataset.from_list(rows))


def test_what_is_in_trls_form_already_is_left_alone():
    rows = Dataset.from_list([{"prompt": USER, "completion": ANSWER}])
    assert convert(rows) is rows


TALK = USER + ANSWER
WORSE = [{"role": "assistant", "content": "b"}]
SYSTEM = [{"role": "system", "content": "s"}]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "q", "chosen": TALK, "rejected": USER + WORSE}, USER),
        ({"instruction": " q\n", "input": "", "chosen": ANSWER, "rejected": WORSE}, [{**USER[0], "content": " q\n"}]),
        ({"instruction": "q", "chosen": ANSWER[0], "rejected": "b"}, USER),
        ({"instruction": "q", "chosen": SYSTEM + TALK, "rejected": SYSTEM + USER + WORSE}, SYSTEM + USER),
        ({"instruction": "q", "system": "s", "chosen": TALK, "rejected": USER + WORSE}, SYSTEM + USER),
        ({"instruction": "q", "system": "s", "chosen": SYSTEM + TALK, "rejected": USER + WORSE}, SYSTEM + USER),
        (
            {
                "instruction": "q",
                "input": "x",
                "chosen": [{"role": "user", "content": "q\nx"}] + ANSWER,
                "rejected": WORSE,
            },
            [{"role": "user", "content": "q\nx"}],
        ),
    ],
)
def test_an_instruction_is_the_prompt_of_sides_that_are_messages(row, prompt):
    found = detect(row, row)
    assert found.kind == "alpaca preference"
    assert convert_row(row, found) == {"prompt": prompt, "chosen": ANSWER, "rejected": WORSE}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instruction": "other", "chosen": TALK, "rejected": TALK}, "chosen is a conversation that begins with other"),
        ({"instruction": "q", "chosen": TALK, "rejected": USER}, "rejected is a conversation that begins with other"),
        ({"instruction": "q", "chosen": "a", "rejected": None}, "rejected is null; it must be a text or messages"),
        ({"instruction": "q", "chosen": [], "rejected": "b"}, "chosen is empty; it must be a text or messages"),
        ({"instruction": "q", "chosen": ["a"], "rejected": "b"}, "chosen holds 'a' of type str, which is no turn"),
        ({"instruction": "q", "chosen": 3, "rejected": "b"}, "chosen holds '3' of type int, which is no turn"),
    ],
)
def test_sides_that_do_not_answer_the_instruction_are_refused_with_the_reason(tmp_path, capsys, row, problem):
    good = {"instruction": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=f"^line 4: {problem}"):
        convert_row(row, detect(good, good), "line 4")
    if isinstance(row["chosen"], list) and row["chosen"]:
        source = tmp_path / "a.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for _ in range(2)))
        with pytest.raises(DataError, match=rf"a\.jsonl, line 1: {problem}"):
            load_preferences(str(source))
        assert main(["data", "convert", str(source), str(tmp_path / "b.jsonl")]) == 3
        said = capsys.readouterr().err
        assert re.search(rf"a\.jsonl, line 1: {problem}", said)
        assert "the row:" not in said and ".." not in said.replace("...", "")


def test_turns_of_sharegpt_and_messages_may_stand_beside_each_other():
    row = {"conversations": USER, "chosen": {"from": "gpt", "value": "a"}, "rejected": WORSE[0]}
    assert convert_row(row, detect(row, row)) == {"prompt": USER, "chosen": ANSWER, "rejected": WORSE}
    row = {"prompt": "q", "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    assert convert_row(row, detect(row, row)) == {"prompt": USER, "chosen": ANSWER, "rejected": WORSE}
