from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from posttrain.data.corruption import rows_to_flip
from posttrain.data.generated import (
    MODULAR_SUM_CHARACTERS,
    WORDS,
    arithmetic_tasks,
    modular_sum_tasks,
    reverse_list_pairs,
)
from posttrain.errors import ConfigError


def words_of(messages):
    return messages[-1]["content"].split(", ")


def test_chosen_is_the_reverse_and_rejected_another_order_of_the_same_words():
    for words in (2, 3, 5):
        rows = reverse_list_pairs(50, seed=0, words=words)
        assert rows.column_names == ["prompt", "chosen", "rejected"] and len(rows) == 50
        for row in rows:
            order, chosen, rejected = (words_of(row[name]) for name in ("prompt", "chosen", "rejected"))
            assert chosen == order[::-1]
            assert rejected != chosen
            assert Counter(rejected) == Counter(chosen) and len(set(chosen)) == words
            assert [message["role"] for message in row["prompt"]] == ["system", "user"]


def test_wrong_orders_are_uniform():
    counts = Counter()
    for row in reverse_list_pairs(2000, seed=0):
        order = words_of(row["prompt"])
        counts[tuple(order.index(word) for word in words_of(row["rejected"]))] += 1
    assert set(counts) == set(permutations(range(3))) - {(2, 1, 0)}
    # 400 expected each, standard deviation 18.
    assert all(320 < count < 480 for count in counts.values())


def test_rows_are_a_pure_function_of_n_and_seed():
    rows = reverse_list_pairs(40, seed=3)
    assert rows.to_list() == reverse_list_pairs(40, seed=3).to_list()
    assert rows.to_list()[:10] == reverse_list_pairs(10, seed=3).to_list()
    assert rows.to_list() != reverse_list_pairs(40, seed=4).to_list()


def test_no_set_of_words_comes_twice_or_from_the_excluded_rows():
    # Pairs of 154 words: 11,781 sets, so that 2,000 and 2,000 would surely meet by chance.
    train = reverse_list_pairs(2000, seed=0, words=2)
    held_out = reverse_list_pairs(2000, seed=1, words=2, exclude=train)
    seen = {frozenset(words_of(row["prompt"])) for row in [*train, *held_out]}
    assert len(seen) == 4000


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        reverse_list_pairs(0, seed=0)
    with pytest.raises(ValueError, match="words=1 must lie between 2 and"):
        reverse_list_pairs(5, seed=0, words=1)
    with pytest.raises(ValueError, match="n=9000.*ask for fewer rows or more words"):
        reverse_list_pairs(9000, seed=0, words=2)


def test_words_are_distinct():
    assert len(set(WORDS)) == len(WORDS) >= 150


def arithmetic_rows(*args, **kwargs):
    """Prompt, demonstration, gold and difficulty of each row, as texts."""
    rows = arithmetic_tasks(*args, conversational=False, **kwargs)
    return [(row["prompt"], row["demonstration"], row["gold"], row["difficulty"]) for row in rows]


def test_arithmetic_tasks_are_the_same_everywhere():
    # No matter PYTHONHASHSEED, which differs from run to run. Difficulty: 1 column of digits + 1; 2 + 2 + 2; 1; 1.
    assert arithmetic_rows(4, seed=0) == [
        ("8 - 5 + 5 =", "8 - 5 = 3\n3 + 5 = 8\n#### 8", "8", 2),
        ("43 + 5 - 2 - 33 =", "43 + 5 = 48\n48 - 2 = 46\n46 - 33 = 13\n#### 13", "13", 6),
        ("1 - 4 =", "1 - 4 = -3\n#### -3", "-3", 1),
        ("2 + 3 =", "2 + 3 = 5\n#### 5", "5", 1),
    ]
    # 4 * 7 takes 1 x 1 columns and 1 + 28 two; 63 * 26 takes 2 x 2 and 1638 - 8 four
    assert arithmetic_rows(2, 0, operands=(3, 3), operators="+-*", demonstration_style="think_answer") == [
        ("1 + 4 * 7 =", "<think>4 * 7 = 28\n1 + 28 = 29</think><answer>29</answer>", "29", 3),
        ("63 * 26 - 8 =", "<think>63 * 26 = 1638\n1638 - 8 = 1630</think><answer>1630</answer>", "1630", 8),
    ]


def test_arithmetic_answers_are_right_and_every_step_holds():
    for prompt, demonstration, gold, _ in arithmetic_rows(500, 1, (2, 5), (1, 3), "+-*"):
        assert eval(prompt.removesuffix("=")) == int(gold)
        *steps, last = demonstration.splitlines()
        assert last == f"#### {gold}" and len(steps) == len(prompt.split()) // 2 - 1
        for step in steps:
            left, result = step.split(" = ")
            assert eval(left) == int(result)


def test_sizes_of_arithmetic_tasks_are_those_asked_for():
    counts, lengths, operators = Counter(), Counter(), Counter()
    for prompt, *_ in arithmetic_rows(2000, 0, (3, 5), (2, 4)):
        parts = prompt.split()[:-1]
        counts[len(parts[::2])] += 1
        lengths.update(map(len, parts[::2]))
        operators.update(parts[1::2])
    assert set(counts) == {3, 4, 5} and set(lengths) == {2, 3, 4} and set(operators) == {"+", "-"}
    # uniform: 667 each, standard deviation 21; and about 2667 of 8000 numbers, standard deviation 42
    assert all(560 < count < 770 for count in counts.values())
    assert all(0.30 < count / lengths.total() < 0.37 for count in lengths.values())


@pytest.mark.parametrize(
    "style, end",
    [("steps", "\n#### 1"), ("boxed", "\n\\boxed{1}"), ("think_answer", "<answer>1</answer>"), ("answer", "#### 1")],
)
def test_styles_mark_the_answer_where_rewards_find_it(style, end):
    from posttrain.rewards.answers import Answer, final_answer

    ((_, demonstration, gold, _),) = arithmetic_rows(1, 4, (2, 2), (1, 1), demonstration_style=style)
    assert gold == "1" and demonstration.endswith(end)
    assert final_answer(demonstration) == Answer("1", alone=True)


def test_tasks_come_as_messages_or_texts_of_the_same_sums():
    asked, bare = arithmetic_tasks(5, 0), arithmetic_tasks(5, 0, conversational=False)
    assert asked[0]["prompt"] == [{"role": "user", "content": "What is 8 - 5 + 5?"}]
    assert asked[0]["demonstration"] == [{"role": "assistant", "content": bare[0]["demonstration"]}]
    assert asked["gold"][:] == bare["gold"][:]
    asked, bare = modular_sum_tasks(5, 0, conversational=True), modular_sum_tasks(5, 0)
    assert asked[1]["prompt"] == [{"role": "user", "content": "What is (0 + 8 + 1 + 8) mod 10?"}]
    assert asked["gold"][:] == bare["gold"][:]


def test_modular_sums_are_the_same_everywhere_and_right():
    rows = modular_sum_tasks(3, seed=0).to_list()
    assert [tuple(row.values()) for row in rows] == [
        ("4+6+7+1+9+5=", "4 0 7 8 7 2", "2", 6),
        ("0+8+1+8=", "0 8 9 7", "7", 4),
        ("1+5=", "1 6", "6", 2),
    ]
    for row in modular_sum_tasks(300, 1, terms=(2, 9), modulus=97):
        terms = [int(term) for term in row["prompt"].removesuffix("=").split("+")]
        running = [sum(terms[: i + 1]) % 97 for i in range(len(terms))]
        assert row["demonstration"] == " ".join(map(str, running)) and row["gold"] == str(running[-1])
        assert row["difficulty"] == len(terms)
        assert set(row["prompt"] + row["demonstration"]) <= set(MODULAR_SUM_CHARACTERS)
    assert modular_sum_tasks(1, 0, demonstration_style="answer")["demonstration"][0] == "2"


@pytest.mark.parametrize(
    "make, sizes", [(arithmetic_tasks, {"operands": (2, 2)}), (modular_sum_tasks, {"terms": (2, 3)})]
)
def test_tasks_come_once_and_held_out_ones_are_disjoint_in_either_form(make, sizes):
    train = make(400, 0, **sizes, conversational=True)
    assert train.to_list()[:10] == make(10, 0, **sizes, conversational=True).to_list()
    held_out = make(100, 1, **sizes, conversational=True, exclude=train)
    # the form of the excluded rows does not matter
    bare = make(400, 0, **sizes, conversational=False)
    assert make(100, 1, **sizes, conversational=True, exclude=bare).to_list() == held_out.to_list()
    prompts = [row["prompt"][0]["content"] for row in [*train, *held_out]]
    assert len(set(prompts)) == 500
    plain = {row["prompt"][0]["content"] for row in make(100, 1, **sizes, conversational=True)}
    assert plain & set(prompts[:400])


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (arithmetic_tasks, {"n": 0}, "n=0 must be an integer between 1 and 1000000"),
        (arithmetic_tasks, {"operands": (1, 2)}, r"operands=\(1, 2\) must be two integers, the fewest \(at least 2\)"),
        (arithmetic_tasks, {"digits": (2, 1)}, r"digits=\(2, 1\) must be two integers"),
        (arithmetic_tasks, {"digits": 2}, "digits=2 must be two integers"),
        (arithmetic_tasks, {"digits": (1, 10**8)}, r"digits=.* the most \(at most 200\)"),
        (arithmetic_tasks, {"operands": (2, 10**8)}, r"operands=.* the most \(at most 200\)"),
        (arithmetic_tasks, {"operands": (2, 100), "digits": (1, 3)}, "tasks of up to 300 digits; 200 are the most"),
        (arithmetic_tasks, {"n": 10**6, "digits": (1, 9)}, "tasks of 36 digits or terms are too many: 555555"),
        (arithmetic_tasks, {"n": 10**7}, "n=10000000 must be an integer between 1 and 1000000"),
        (arithmetic_tasks, {"operators": "+/"}, r"operators='\+/' must be different ones of \+-\*"),
        (arithmetic_tasks, {"operators": ""}, "operators=''"),
        (arithmetic_tasks, {"demonstration_style": "cot"}, "demonstration_style='cot' is not one of 'steps', 'boxed'"),
        # 10 x 10 sums of two single digits
        (arithmetic_tasks, {"n": 51, "operands": (2, 2), "digits": (1, 1), "operators": "+"}, "n=51 .* there are 50"),
        (modular_sum_tasks, {"terms": (1, 2)}, r"terms=\(1, 2\) must be two integers, the fewest \(at least 2\)"),
        (modular_sum_tasks, {"modulus": 1}, "modulus=1 must be an integer between 2 and 1000000"),
        (modular_sum_tasks, {"demonstration_style": "boxed"}, "'boxed' is neither 'steps' nor 'answer'"),
        (modular_sum_tasks, {"n": 51, "terms": (2, 2)}, "n=51 with 0 excluded tasks is too many: there are 50"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_are_refused(make, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(**{"n": 5, "seed": 0, **arguments})


def test_numpys_numbers_are_those_of_python():
    given = dict(terms=(np.int8(2), np.int8(3)), modulus=np.int16(10))
    made = modular_sum_tasks(np.int64(8), np.int64(1), **given)
    assert made.to_list() == modular_sum_tasks(8, 1, terms=(2, 3), modulus=10).to_list()
    assert rows_to_flip(20, 0.5, np.int64(3)) == rows_to_flip(20, 0.5, 3)
