"""What belongs to one of a pair's two answers, and what becomes of it when they are swapped."""

import re
from collections.abc import Mapping, Sequence

# Names under which pairs carry the scores of both answers
PAIR_REWARDS = (
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
# Columns that hold a list of two, for chosen and for rejected
_OF_BOTH = re.compile(r"(.*_)?(scores?|ratings?|rewards?|logprobs?|logps)")
# Columns of answers in an order of their own, which a list of ratings beside them follows
_ANSWERS = ("generations", "completions", "responses", "answers", "candidates")
_DIFFERENCE = re.compile(r"(.*[_-])?(margins?|difference|diff|delta|gap)([_-].*)?")
_NAMES = {"chosen": "rejected", "rejected": "chosen"}


def swapped(row: Mapping) -> dict:
    """A pair with its two answers swapped, and all that belongs to one of them.

    - Two columns whose names differ in the word chosen or rejected only are swapped: chosen_reward, score_chosen,
      chosen-rating, also inside an object.
    - A list of two numbers in a column of scores, ratings or rewards is for chosen and rejected, and turns round; not
      where a column of answers (generations, ...) stands beside it, whose order it follows.
    - A column `order` of the words chosen and rejected changes each for the other.
    - A number in a column that is a margin, difference, diff, delta or gap between the sides changes its sign.

    Other columns keep their values, and the row its order of columns.
    """
    new = _swapped_names(row)
    own_order = any(isinstance(row.get(name), list) for name in _ANSWERS)
    for name, value in row.items():
        if name == "order" and isinstance(value, list) and value and set(value) <= set(_NAMES):
            new[name] = [_NAMES[word] for word in value]
        elif _is_pair_of_numbers(value) and _OF_BOTH.fullmatch(name.lower()) and not own_order:
            new[name] = list(reversed(value))
        elif _is_number(value) and _DIFFERENCE.fullmatch(name.lower()) and _counterpart(name) not in row:
            # without a minus sign before zero
            new[name] = -value or value * 0
    return new


def scores_of(columns: Sequence[str]) -> tuple[str, str] | None:
    """The two columns that hold the scores of both answers; None where there are none."""
    return next((names for names in PAIR_REWARDS if set(names) <= set(columns)), None)


def _swapped_names(row: Mapping) -> dict:
    new = dict(row)
    for name in row:
        other = _counterpart(name)
        if other in row:
            new[name] = row[other]
        elif isinstance(row[name], Mapping):
            new[name] = _swapped_names(row[name])
    return new


def _counterpart(name: str) -> str | None:
    """The name with rejected for chosen, or chosen for rejected; None where it has neither."""
    for word, other in _NAMES.items():
        for form in (str.lower, str.capitalize, str.upper):
            if form(word) in name:
                return name.replace(form(word), form(other))
    return None


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pair_of_numbers(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
