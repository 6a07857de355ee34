"""Preference pairs that the library makes itself, with labels that are right by construction."""

import math
import random
from collections.abc import Iterable

# Common short nouns, each a single token of SmolLM2's vocabulary, at the start of a text and after a space.
WORDS = """ apple arrow ball bank bean bear bed bee bell belt bench bird boat bone book boot box branch bread
bridge brush bucket bus button camera camp car card castle cat chain chair clock cloud coat coin cookie corn
cup dish doctor dog door dream ear egg engine eye face farm field finger fire fish flag floor flower forest
fox frame fruit gate glass gold grass hair hand hat heart hill horse house ice iron jar key king lake leaf
letter lion lock map market mask milk moon mouse mouth neck nest net night nose nut ocean orange oven owl
paper park phone pie pig pin pipe planet plant plate pool radio rain rice ring river road robe rock room root
rose salt sand school seed shell ship shirt shop skin sky snake snow sock soup spring star stone store storm
street sugar sun table thread tower town train tree watch water wave wheel window wing winter wolf wood
""".split()

SYSTEM_PROMPT = "Reverse the list."


def reverse_list_pairs(n: int, seed: int, words: int = 3, exclude: Iterable[dict] = ()):
    """`n` conversational preference pairs about reversing a list of `words` distinct words.

    The chosen answer is the list in reverse; the rejected one another order of the same words, uniform over
    the wrong orders. Both sides hold the same words, so their order alone tells them apart. No two lists of
    one call, nor a list and one of the rows in `exclude` (of an earlier call), hold the same set of words.

    A pure function of its arguments; the first rows do not depend on `n`. Returns a `datasets.Dataset` with
    the columns prompt, chosen and rejected. Raises ValueError if `words` is below 2 or there are not enough
    sets of words.
    """
    from datasets import Dataset

    if n < 1:
        raise ValueError(f"n={n} must be at least 1.")
    if not 2 <= words <= len(WORDS):
        raise ValueError(f"words={words} must lie between 2 and {len(WORDS)}.")
    used = {frozenset(row["prompt"][-1]["content"].split(", ")) for row in exclude}
    available = math.comb(len(WORDS), words)
    # Sets are drawn until a new one comes up, so half of them are left free.
    if n + len(used) > available // 2:
        raise ValueError(
            f"n={n} with {len(used)} excluded lists is too many: {words} words allow {available // 2}; "
            "ask for fewer rows or more words."
        )
    generator = random.Random(f"reverse_list {words} {seed}")
    rows = []
    while len(rows) < n:
        order = generator.sample(WORDS, words)
        if frozenset(order) in used:
            continue
        used.add(frozenset(order))
        right = order[::-1]
        wrong = right
        while wrong == right:
            wrong = generator.sample(order, words)
        rows.append(_row(order, right, wrong))
    return Dataset.from_list(rows)


def _row(order: list[str], right: list[str], wrong: list[str]) -> dict:
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": ", ".join(order)},
        ],
        "chosen": [{"role": "assistant", "content": ", ".join(right)}],
        "rejected": [{"role": "assistant", "content": ", ".join(wrong)}],
    }
