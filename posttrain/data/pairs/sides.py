"""What belongs to one of a pair's two answers, and what becomes of it when they are swapped."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
# The words that names of both sides differ in
_PAIRS = (("chosen", "rejected"), ("winner", "loser"), ("preferred", "dispreferred"), ("better", "worse"), ("w", "l"))
# Those that say the sides only beside a word of answers or scores: a negative prompt is none
_PAIRS_OF_ANSWERS = (
    *(("accepted", "rejected"), ("preferred", "rejected"), ("winning", "losing"), ("win", "lose"), ("win", "loss")),
    *(("positive", "negative"), ("pos", "neg"), ("good", "bad"), ("best", "worst"), ("j", "k")),
)
_OF_ANSWERS = (
    r"responses?|answers?|completions?|outputs?|generations?|texts?|models?|lengths?|len|tokens|rationales?|reasons?"
    r"|explanations?|critiques?"
)
# Words that say one side wherever they stand
_SIDES = ("chosen", "rejected", "winner", "loser", "dispreferred")
_OF_SCORES = r"scores?|ratings?|rewards?|logprobs?|logps|probs?|p|probabilit(y|ies)|logits?|ranks?|grades?|points"
# Columns of answers in an order of their own, which a list of ratings beside them follows
_ANSWERS = ("generations", "completions", "responses", "answers", "candidates")
_DIFFERENCE = ("margin", "margins", "difference", "diff", "delta", "gap")
_SCORES = re.compile(rf"({_OF_SCORES}|quality|preferences?|implicit|pairs?|mean|avg|average|overall|judge|llm|gpt4?)")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+")


class Swapped(NamedTuple):
    """A pair with its answers swapped, and what could not be.

    Attributes:
        emptied: columns that became null: those of one side's score alone.
        left: columns named after one side alone whose values stayed, though the other answer stands there.
    """

    row: dict
    emptied: list[str]
    left: list[str]


def swapped(row: Mapping) -> dict:
    """Swap a pair's two answers, and all that belongs to one of them.

    - Two columns whose names differ in the side only are swapped, whatever else they say: chosen_reward and
      rejected_reward, chosen_prob, chosen-rating, score_w and score_l, pos_score and neg_score, score_good and
      score_bad, response_j_score and response_k_score, also inside objects and lists of objects.
    - A score of one side without the other's (chosen_score alone) becomes null, since the other's is not known.
    - A list of two numbers, or of two lists of them, in a column named scores, ratings or rewards (judge_ratings; not
      sentence_scores) is for chosen and rejected, and turns round; not where a column of answers (generations, ...)
      stands beside it, whose order it follows.
    - A column `order` of the words chosen and rejected changes each for the other.
    - A number in a column that is a margin, difference, diff, delta or gap between scores (score_diff, reward_margin,
      or that word alone) changes its sign.

    Other columns keep their values, and the row its order of columns.
    """
    return swapped_with_gaps(row).row


def swapped_with_gaps(row: Mapping) -> Swapped:
    """Swap as `swapped` does, and name the columns that became null, and those that stayed with the wrong answer."""
    emptied: list[str] = []
    left: list[str] = []
    new = _swapped_names(row, emptied, left)
    own_order = any(isinstance(row.get(name), list) for name in _ANSWERS)
    for name, value in row.items():
        if name == "order" and isinstance(value, list) and value and set(value) <= {"chosen", "rejected"}:
            new[name] = ["rejected" if word == "chosen" else "chosen" for word in value]
        elif _is_of_both(value) and _is_score_of_both(name) and not own_order:
            new[name] = list(reversed(value))
        elif _is_number(value) and _is_difference(name) and not set(_counterparts(name)) & set(row):
            # without a minus sign before zero
            new[name] = -value or value * 0
    return Swapped(new, emptied, left)


def scores_of(columns: Sequence[str]) -> tuple[str, str] | None:
    """Return the two columns that hold the scores of both answers; None where there are none."""
    return next((names for names in PAIR_REWARDS if set(names) <= set(columns)), None)


def _swapped_names(row: Mapping, emptied: list[str], left: list[str], path: str = "") -> dict:
    new = dict(row)
    for name, value in row.items():
        other = _other_side(name, row)
        if other is not None:
            new[name] = row[other]
        elif value is not None and _is_score_of_one(name) and (_is_number(value) or isinstance(value, list)):
            new[name] = None
            emptied.append(path + name)
        elif value is not None and _is_of_one(name):
            left.append(path + name)
        elif isinstance(value, Mapping):
            new[name] = _swapped_names(value, emptied, left, f"{path}{name}.")
        elif isinstance(value, list) and not path and name in ("prompt", "messages", "tools"):
            continue
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            new[name] = [
                _swapped_names(item, emptied, left, f"{path}{name}.") if isinstance(item, Mapping) else item
                for item in value
            ]
    return new


def _other_side(name: str, row: Mapping) -> str | None:
    """Return the column that the other side has in the place of this one; None where there is none."""
    other = next((other for other in _counterparts(name) if other in row), None)
    # of three columns two are a pair
    back = other and next((one for one in _counterparts(other) if one in row), None)
    return other if back == name else None


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(name)]


def _counterparts(name: str) -> list[str]:
    """Return the names with the other side's word in the place of one's, in its own capitals.

    The most telling first.
    """
    found = []
    of_answers = any(re.fullmatch(f"{_OF_SCORES}|{_OF_ANSWERS}", word) for word in _words(name))
    for one, two in (*_PAIRS, *(_PAIRS_OF_ANSWERS if of_answers else ())):
        for word, other in ((one, two), (two, one)):
            for match in _WORDS.finditer(name):
                given = match.group()
                # a letter alone is a name of its own, such as a width
                if given.lower() == word and (len(word) > 1 or given != name):
                    form = str.upper if given.isupper() else str.capitalize if given[0].isupper() else str.lower
                    found.append(name[: match.start()] + form(other) + name[match.end() :])
    return found or [name.replace(*names) for names in (_PAIRS[0], _PAIRS[0][::-1]) if names[0] in name]


def _is_score_of_both(name: str) -> bool:
    words = _words(name)
    return bool(words) and bool(re.fullmatch(_OF_SCORES, words[-1])) and all(map(_SCORES.fullmatch, words))


def _is_score_of_one(name: str) -> bool:
    words = set(_words(name))
    return bool(words & {"chosen", "rejected"}) and not {"chosen", "rejected"} <= words and any(
        re.fullmatch(_OF_SCORES, word) for word in words
    ) and not words & set(_DIFFERENCE)  # fmt: skip


def _is_of_one(name: str) -> bool:
    """Tell whether a name is that of one side, and no difference between the two."""
    words = _words(name)
    return sum(word in _SIDES for word in words) == 1 and not set(words) & set(_DIFFERENCE)


def _is_difference(name: str) -> bool:
    """Tell whether a name says a margin between the sides: of scores, or of nothing else."""
    words = _words(name)
    rest = [word for word in words if word not in _DIFFERENCE]
    sides = ("chosen", "rejected", "minus", "of", "between", "and", "vs")
    return len(rest) < len(words) and all(word in sides or _SCORES.fullmatch(word) for word in rest)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_of_both(value) -> bool:
    """Tell whether a list holds a number, or a list of numbers, for each of two sides."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    lists = all(isinstance(item, list) and item and all(map(_is_number, item)) for item in value)
    return lists or all(map(_is_number, value))
