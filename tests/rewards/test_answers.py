from fractions import Fraction

import pytest

from posttrain.rewards.answers import Answer, answer_number, final_answer, gold_answer, read_number


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"First \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"done: \boxed{3} and the rest was cut \boxed{4", "3"),
        ("2 + 2 = 4\n#### 4\n", "4"),
        ("#### 1\n#### 2 apples\nbye", "2 apples"),
        ("<answer>5</answer>", "5"),
        (r"<answer>so \boxed{5}</answer>", "5"),
        (r"\boxed{6} <answer>5</answer>", "5"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    ],
)
def test_a_marked_answer_is_found(text, answer):
    assert final_answer(text) == Answer(answer, alone=True)


def test_the_whole_text_is_searched_where_nothing_is_marked():
    assert final_answer("it is 3") == Answer("it is 3", alone=False)
    assert final_answer("<think>4</think>it is 3") == Answer("it is 3", alone=False)
    # a box that is not closed marks nothing
    assert final_answer(r"it is \boxed{3") == Answer(r"it is \boxed{3", alone=False)


@pytest.mark.parametrize("text", ["", "  \n", "<think>the answer is 3", r"<think>\boxed{3}</think>", "</think>"])
def test_no_answer_is_found_in_thoughts_or_nothing(text):
    assert final_answer(text) is None


def test_one_place_alone_can_be_asked_for():
    text = "<answer>1</answer>\n#### 2\n\\boxed{3} 4"
    found = {place: final_answer(text, place) for place in ("tag", "hash", "boxed", "last")}
    assert [found[place].text for place in ("tag", "hash", "boxed")] == ["1", "2", "3"]
    assert answer_number(found["last"]) == 4
    assert [final_answer("just 4", place) for place in ("tag", "hash", "boxed")] == [None] * 3


@pytest.mark.parametrize(
    "text, number",
    [
        ("72", 72),
        ("1,234,567", 1234567),
        ("-1,234.50", Fraction(-2469, 2)),
        ("+7", 7),
        ("−7", -7),
        (".5", Fraction(1, 2)),
        ("1e3", 1000),
        ("2.5e-1", Fraction(1, 4)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("2 3/4", Fraction(11, 4)),
        ("-2 3/4", Fraction(-11, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"2\frac{3}{4}", Fraction(11, 4)),
        ("$18", 18),
        (r"\$18.00", 18),
        ("-$5", -5),
        ("$-5$", -5),
        ("50%", 50),
        (r"50\%", 50),
        ("72.", 72),
        ("72 apples", 72),
        (r"72\text{ km}", 72),
        ("x = 72", 72),
        ("0072", 72),
    ],
)
def test_numbers_are_read_exactly(text, number):
    assert read_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "none", "3x^2+1", "12, 13", "3+4", r"2\sqrt{3}", r"\sqrt{3}", "2^3", "1/0", "(1, 2)", "3/4/5", "1e999999"]
    + ["9" * 2000, "1.2.3", "3π"],
)
def test_other_mathematics_is_no_number(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    "text, number",
    [
        ("12 - 7 = 5, so 5.", 5),
        ("10-3", 3),
        ("from 3 to -4", -4),
        ("It costs $1,250.50 in all", Fraction(2501, 2)),
        ("1,2,3", 3),
        ("version v2 has 7", 7),
        ("7 of them, see item2", 7),
        ("half, or 1/2", Fraction(1, 2)),
        ("no number", None),
    ],
)
def test_the_last_number_of_a_text_is_its_answer(text, number):
    assert answer_number(Answer(text, alone=False)) == number


def test_gold_answers_may_be_numbers_expressions_or_worked_solutions():
    assert gold_answer(72) == Answer("72", True) and gold_answer(2.5) == Answer("2.5", True)
    assert gold_answer("She has 3.\n#### 1,234").text == "1,234"
    assert gold_answer(r"so $x = \boxed{3}$").text == "3"
    assert [gold_answer(value) for value in (None, True, "", "  ")] == [None] * 4
    # a sentence is not searched for a number
    assert answer_number(gold_answer("4 of 5")) is None
