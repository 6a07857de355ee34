import pytest
from datasets import Dataset

from posttrain.data.formats import convert, detect
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


def test_an_unknown_speaker_is_named_with_its_row():
    rows = [{"conversations": TURNS}, {"conversations": [{"from": "narrator", "value": "x"}]}]
    with pytest.raises(DataError, match="row 2: the turn's speaker is 'narrator'; .* human, gpt"):
        convert(Dataset.from_list(rows))


def test_what_is_in_trls_form_already_is_left_alone():
    rows = Dataset.from_list([{"prompt": USER, "completion": ANSWER}])
    assert convert(rows) is rows
