"""What belongs to one answer of a pair goes with it when they are swapped, and nothing else changes."""

import pytest
from datasets import Dataset

from posttrain.data.corruption import flip_preferences, lone_columns
from posttrain.data.pairs.sides import swapped


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
        ("pos_score", "neg_score"),
        ("score_good", "score_bad"),
        ("win_score", "lose_score"),
        ("winScore", "lossScore"),
        ("response_j_score", "response_k_score"),
        ("accepted_score", "rejected_score"),
        ("positive_response", "negative_response"),
        ("best_answer", "worst_answer"),
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
    assert name in lone_columns([{"chosen": "c", "rejected": "r", name: 9.0}])[0]
    rows = Dataset.from_list([{"chosen": "c", "rejected": "r", name: float(i)} for i in range(10)])
    made = flip_preferences(rows, 0.5)
    assert [row[name] is None for row in made] == made["flipped"][:]


@pytest.mark.parametrize(
    "columns",
    [
        {"model_a": "a", "chosen_score": None},
        {"positive_prompt": "a", "negative_prompt": "b"},
        {"good": 3, "bad": 4},
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
        {"margin": None},
        {"prompt": [{"role": "user", "content": "x", "chosen": 1, "rejected": 2}]},
    ],
)
def test_what_is_no_sides_keeps_its_value(columns):
    assert flipped(**columns) == columns
    assert lone_columns([{"chosen": "c", "rejected": "r", **columns}]) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("rationale_chosen", "so"), ("chosen_model", "a"), ("winner", "A"), ("rejected_length", 17), ("loserIds", [1])],
)
def test_what_is_named_after_one_side_alone_stays_and_is_said(name, value, logged):
    assert flipped(**{name: value}) == {name: value}
    said = f"{name}: named after one side, without a column of the other's, and kept as it is in swapped rows"
    assert lone_columns([{"chosen": "c", "rejected": "r", name: value}])[0].startswith(said)
    flip_preferences(Dataset.from_list([{"chosen": "c", "rejected": "r", name: value}] * 4), 0.5)
    assert said in logged.text
    assert lone_columns([{"chosen": "c", "rejected": "r", name: None}]) == []


def test_of_three_columns_for_two_sides_the_plainest_pair_is_swapped_and_no_value_is_lost():
    row = {"chosen_score": 1, "rejected_score": 2, "accepted_score": 3}
    assert flipped(**row) == {"chosen_score": 2, "rejected_score": 1, "accepted_score": 3}


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
