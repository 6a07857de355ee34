"""Layers and strengths of hidden noise, chosen by what each does alone."""

import pytest

from posttrain.mechanisms.noise.calibration import FACTORS, choose

QUIET = [[0.0] * 5 for _ in range(9)]


def rising(heights):
    """Divergences that grow with the strength, to a height of each layer."""
    return [[height * factor / 2.0 for factor in FACTORS] for height in heights]


def test_layers_that_stand_out_are_taken_with_the_smallest_strength_that_does_as_much():
    found = choose(rising([1, 1, 1, 1, 5, 1, 1, 1, 9]), QUIET, 2.0)
    # a median of 1 and no deviation: all reach it, three of nine are taken, one of each third first
    assert found.layers == [0, 4, 8] and len(found.scores) == 9
    # the best divergences are 1, 5 and 9: 0.75 of 5 is reached by 5 at 1.5 and by 9 at 1.0, by 1 never
    assert found.factors == [2.0, 1.5, 1.0]
    # the score at the greatest strength: 9 / (1 + 1 / 20)
    assert found.scores[8] == pytest.approx(9 / 1.05)


def test_strengths_that_raise_cross_entropy_too_much_do_not_count_unless_all_do():
    rises = [row[:] for row in QUIET]
    rises[8] = [0.0, 0.0, 0.5, 0.5, 0.5]
    found = choose(rising([1, 1, 1, 1, 5, 1, 1, 1, 9]), rises, 2.0)
    assert found.scores[8] == pytest.approx(9 * 0.25 / 1.05) and found.factors[-1] == 0.5
    every = choose(rising([1, 1, 1, 1, 5, 1, 1, 1, 9]), [[1.0] * 5 for _ in range(9)], 2.0)
    assert every.layers == [0, 4, 8]
    # a fall counts as none
    falling = choose(rising([1, 1, 1, 1, 5, 1, 1, 1, 9]), [[-1.0] * 5 for _ in range(9)], 2.0)
    assert falling == choose(rising([1, 1, 1, 1, 5, 1, 1, 1, 9]), QUIET, 2.0)


def test_a_third_of_the_depth_has_more_than_its_share_only_where_no_other_has_any_left():
    assert choose(rising([1, 1, 1, 1, 1, 1, 7, 8, 9]), QUIET, 2.0).layers == [0, 3, 8]
    alone = choose(rising([1, 2, 1, 2, 1, 2, 7, 8, 9]), QUIET, 2.0)
    assert alone.layers == [6, 7, 8]


def test_one_layer_is_a_model_too():
    found = choose([[0.1, 0.2, 0.3, 0.4, 0.5]], [[0.0] * 5], 1.0)
    assert found.layers == [0] and found.factors == [1.5]
