import pytest
from datasets import Dataset

from posttrain.data.corruption import flip_preferences
from posttrain.data.generated import reverse_list_pairs


@pytest.fixture
def pairs():
    return Dataset.from_list(
        [
            {
                "prompt": f"p{i}",
                "chosen": f"good {i}",
                "rejected": f"bad {i}",
                "chosen_reward": float(i),
                "rejected_reward": -float(i),
                "source": f"s{i}",
            }
            for i in range(1, 38)
        ]
    )


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.99])
def test_exactly_the_asked_share_is_swapped_with_paired_columns_and_nothing_else_changes(pairs, rate):
    flipped = flip_preferences(pairs, rate, seed=1)
    assert sum(flipped["flipped"]) == round(rate * len(pairs))
    assert flipped.features["flipped"].dtype == "bool"
    for before, after in zip(pairs, flipped, strict=True):
        if after.pop("flipped"):
            for side in ("", "_reward"):
                names = "chosen" + side, "rejected" + side
                before[names[0]], before[names[1]] = before[names[1]], before[names[0]]
        assert after == before


def test_the_rows_depend_on_the_seed_alone_and_nest_over_rates(pairs):
    chosen = [
        {i for i, flag in enumerate(flip_preferences(pairs, rate, seed)["flipped"]) if flag}
        for rate, seed in ((0.3, 0), (0.3, 0), (0.3, 1), (0.5, 0))
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] < chosen[3]


def test_conversational_pairs_are_swapped_whole():
    pairs = reverse_list_pairs(10, seed=0)
    flipped = flip_preferences(pairs, 0.5)
    for before, after in zip(pairs, flipped, strict=True):
        sides = [after["chosen"], after["rejected"]]
        assert (sides[::-1] if after["flipped"] else sides) == [before["chosen"], before["rejected"]]


def test_flipping_twice_with_one_seed_restores_the_rows(pairs):
    back = flip_preferences(flip_preferences(pairs, 0.3, seed=2), 0.3, seed=2)
    assert not any(back["flipped"])
    assert back.remove_columns("flipped").to_list() == pairs.to_list()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_outside_the_range_is_refused(pairs, rate):
    with pytest.raises(ValueError, match=r"rate=.* must lie in \[0, 1\)"):
        flip_preferences(pairs, rate)


def test_a_data_set_without_pairs_is_refused(pairs):
    with pytest.raises(ValueError, match="needs the columns 'chosen' and 'rejected'; found .*prompt"):
        flip_preferences(pairs.remove_columns("rejected"), 0.1)
