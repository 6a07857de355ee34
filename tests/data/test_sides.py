"""What belongs to one answer of a pair goes with it when they are swapped, and nothing else changes."""

import pytest
from datasets import Dataset

from posttrain.data.corruption import flip_preferences, lone_scores
from posttrain.data.sides import swapped


def flipped(**columns):
    row = swapped({"chosen": "c", "rejected": "r", **columns})
    assert (row.pop("chosen"), row.pop("rejected")) == ("r", "c")
    return row


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("chosen_score", "rejected_score"),
        ("chosen_prob", "rejected_prob"),
        ("p_chosen", "p_rejected"),
        ("chosen-length", "rejected-length"),
        ("chosenScore", "rejectedScore"),
        ("scoreChosen", "scoreRejected"),
        ("SCORE_CHOSEN", "SCORE_REJECTED"),
        ("original_chosen", "original_rejected"),
        ("score_w", "score_l"),
        ("winner_score", "loser_score"),
        ("preferred_rating", "dispreferred_rating"),
        ("better_logps", "worse_logps"),
    ],
)
def test_two_columns_whose_names_differ_in_the_side_are_swapped(one, other):
    assert flipped(**{one: 1, other: 2}) == {one: 2, other: 1}
    assert flipped(meta={"a": {one: 1, other: 2}}) == {"meta": {"a": {one: 2, other: 1}}}
    assert flipped(meta=[{one: 1, other: 0}, {"n": 3}]) == {"meta": [{one: 0, other: 1}, {"n": 3}]}


@pytest.mark.parametrize(
    "name", ["chosen_score", "score_chosen", "rejected_rating", "chosen_avg_rating", "chosenReward"]
)
def test_a_score_of_one_side_alone_becomes_null_and_is_named(name):
    assert flipped(**{name: 9.0}) == {name: None}
    assert flipped(meta={name: 9.0}) == {"meta": {name: None}}
    assert name in lone_scores([{"chosen": "c", "rejected": "r", name: 9.0}])
    rows = Dataset.from_list([{"chosen": "c", "rejected": "r", name: float(i)} for i in range(10)])
    made = flip_preferences(rows, 0.5)
    assert [row[name] is None for row in made] == made["flipped"][:]


@pytest.mark.parametrize(
    "columns",
    [
        {"chosen_model": "a", "chosen_score": None},
        {"age_gap": 3},
        {"time_difference": 5.0},
        {"gap_year": 2},
        {"word_diff": 2},
        {"sentence_scores": [0.1, 0.2]},
        {"annotator_ratings": [1, 2]},
        {"scores": [1, 2, 3]},
        {"scores": [0.1, "x"]},
        {"scores": [5, 4], "generations": ["c", "r"]},
        {"w": 640, "l": 480},
        {"winner": "A"},
        {"chosen_at": 17},
        {"margin": None},
        {"prompt": [{"role": "user", "content": "x", "chosen": 1, "rejected": 2}]},
    ],
)
def test_what_is_no_sides_keeps_its_value(columns):
    assert flipped(**columns) == columns
    assert lone_scores([{"chosen": "c", "rejected": "r", **columns}]) == ""


@pytest.mark.parametrize("name", ["scores", "ratings", "rewards", "score", "rating", "logps"])
def test_a_list_for_both_sides_turns_round(name):
    assert flipped(**{name: [5, 4]}) == {name: [4, 5]}
    assert flipped(**{name: [[5, 4], [2, 1]]}) == {name: [[2, 1], [5, 4]]}
    assert flipped(**{name: [[5], [2.5, 1]]}) == {name: [[2.5, 1], [5]]}


@pytest.mark.parametrize(
    "name", ["margin", "gap", "delta", "reward_margin", "score_diff", "rating-gap", "score_difference", "scoreMargin",
             "preference_margin", "chosen_minus_rejected_score_diff", "margin_of_rewards"],
)  # fmt: skip
def test_a_difference_of_scores_changes_its_sign(name):
    assert flipped(**{name: 1.5}) == {name: -1.5}
    assert str(flipped(**{name: 0.0})[name]) == "0.0"
