"""Gold answers are texts or numbers, and what is neither is refused before it becomes one."""

import json
from decimal import Decimal

import pytest
from datasets import Dataset

from posttrain import QAEConfig, QAETrainer
from posttrain.data.tasks.loading import load_demonstrations
from posttrain.errors import DataError
from posttrain.rewards import ExactMatch, MathsAnswer, check_golds
from posttrain.rewards.base import check_missing_golds
from posttrain.rewards.golds import gold_text, is_missing
from tests.rollouts import settings, success

ASKED = [{"role": "user", "content": "who?"}]
NAN = float("nan")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def verl(gold):
    return {"prompt": ASKED, "reward_model": {"style": "rule", "ground_truth": gold}}


def rlvr(gold):
    return {"messages": ASKED, "ground_truth": gold}


def ours(gold):
    return {"prompt": ASKED, "gold": gold}


@pytest.mark.parametrize("row", [verl, rlvr, ours])
@pytest.mark.parametrize(
    ("gold", "what"),
    [
        ({"target": ["Paris"]}, "an object"),
        (["Paris", "paris"], "a list"),
        ([], "a list"),
        (None, "null|is missing"),
        (NAN, "nan, a missing value"),
        (float("inf"), "inf"),
        ("  ", "a blank text"),
    ],
)
def test_a_gold_answer_that_is_none_is_refused_with_its_row(tmp_path, row, gold, what):
    source = write(tmp_path / "a.jsonl", row("Paris"), row(gold))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*(gold|ground_truth).*({what})"):
        load_demonstrations(source, need_demonstrations=False)


@pytest.mark.parametrize("row", [verl, rlvr, ours])
@pytest.mark.parametrize(
    ("gold", "text"), [("Paris ", "Paris"), (7, "7"), (2.5, "2.5"), ("nan", "nan"), ("[1]", "[1]")]
)
def test_texts_and_numbers_are_gold_answers(tmp_path, row, gold, text):
    rows = load_demonstrations(write(tmp_path / "a.jsonl", row(gold)), need_demonstrations=False)
    assert rows["gold"][:] == [text]


def test_what_pandas_writes_for_none_is_missing_and_bytes_are_no_text():
    assert all(map(is_missing, (NAN, Decimal("nan"), None, " ")))
    assert not any(map(is_missing, (0, False, "nan", [])))
    assert gold_text(Decimal("1.50"), "gold") == "1.50"
    with pytest.raises(DataError, match="line 1: 'gold', the gold answer, is of type bytes"):
        gold_text(b"x", "gold", "line 1")


def test_the_check_of_gold_answers_names_nan(tmp_path):
    for reward in (ExactMatch(), MathsAnswer(engine="numbers")):
        with pytest.raises(DataError, match=r"train_dataset, row 2: .*it is NaN, a missing value"):
            check_golds(Dataset.from_list([{"gold": 1.0}, {"gold": NAN}]), "gold", reward)
    assert ExactMatch()(completions=["nan", "1.0"], gold=[NAN, 1.0]) == [None, 1.0]


def rows(*golds):
    return Dataset.from_list([{"prompt": "1 of row", "gold": gold, "word": "a"} for gold in golds])


def test_missing_gold_answers_of_a_data_set_at_hand_are_refused_where_a_reward_reads_them():
    with pytest.raises(DataError, match=r"d, row 2: the gold answer in column 'gold' is NaN"):
        check_missing_golds([success, ExactMatch()], rows(1.0, NAN), "d")
    with pytest.raises(DataError, match=r"d, row 3: the gold answer in column 'gold' is missing, so no reward can"):
        check_missing_golds([ExactMatch()], rows("a", "b", None), "d")
    with pytest.raises(DataError, match="d, row 1: the gold answer in column 'gold' is missing"):
        check_missing_golds([ExactMatch(), MathsAnswer(engine="numbers")], rows(" ", "1"), "d")


def test_rows_that_other_rewards_score_are_said(logged):
    check_missing_golds([ExactMatch(), success], rows("a", None, None), "d")
    assert "d: 2 of 3 rows have no gold answer in column 'gold' (first: row 2)" in logged.text
    logged.clear()
    check_missing_golds([ExactMatch(gold="word"), success], rows("a", None), "d")
    check_missing_golds([success], rows(1.0, NAN), "d")
    check_missing_golds([ExactMatch()], rows("a", "b"), "d")
    check_missing_golds([ExactMatch()], rows("a", None).to_iterable_dataset(), "d")
    check_missing_golds(None, rows(None), "d")
    assert logged.text == ""


def test_a_trainer_refuses_missing_gold_answers_at_construction(tmp_path, tiny_folder):
    for golds, place in (((1.0, NAN), "train_dataset, row 2"), (("1", None), "train_dataset, row 2")):
        with pytest.raises(DataError, match=place):
            QAETrainer(tiny_folder, ExactMatch(), QAEConfig(**settings(tmp_path / "out")), rows(*golds))
    args, held_out = QAEConfig(**settings(tmp_path / "out")), {"held_out": rows(None)}
    with pytest.raises(DataError, match="held_out, row 1"):
        QAETrainer(tiny_folder, [ExactMatch()], args, rows("1", "2"), held_out)
