from collections import Counter
from itertools import permutations

import pytest

from posttrain.data.procedural import WORDS, reverse_list_pairs


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
