"""Data that the library makes itself, right by construction: preference pairs, and tasks with worked solutions."""

import math
import random
import re
from collections.abc import Iterable
from itertools import accumulate

from posttrain.checks import check_integer, plain, shorten
from posttrain.errors import ConfigError

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
    """Make `n` conversational preference pairs about reversing a list of `words` distinct words.

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


def reversed_share(prompt: list[dict], answer: list[dict]) -> float:
    """Return the share of a list's words that an answer has in their place of the reversed list."""
    right = prompt[-1]["content"].split(", ")[::-1]
    given = answer[-1]["content"].split(", ")
    return sum(one == other for one, other in zip(given, right, strict=False)) / len(right)


def _row(order: list[str], right: list[str], wrong: list[str]) -> dict:
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": ", ".join(order)},
        ],
        "chosen": [{"role": "assistant", "content": ", ".join(right)}],
        "rejected": [{"role": "assistant", "content": ", ".join(wrong)}],
    }


# Rows, digits of all numbers (terms) in one of them, and in all rows: a worked product writes the square of the second.
MOST_ROWS, MOST_DIGITS, MOST_IN_ALL = 1_000_000, 200, 20_000_000
STYLES = ("steps", "boxed", "think_answer", "answer")
OPERATORS = "+-*"
# of prompts and demonstrations as text
MODULAR_SUM_CHARACTERS = "0123456789+= "


def arithmetic_tasks(
    n: int,
    seed: int,
    operands: tuple[int, int] = (2, 4),
    digits: tuple[int, int] = (1, 2),
    operators: str = "+-",
    demonstration_style: str = "steps",
    conversational: bool = True,
    exclude: Iterable[dict] = (),
):
    """Make `n` sums such as 12 + 7 - 3 with their solution worked step by step.

    Args:
        operands: fewest and most numbers in a task, at least 2; uniform between.
        digits: fewest and most digits of a number; uniform between. A task has 200 digits at most.
        operators: any of + - *, each drawn as often; products are worked out first.
        demonstration_style: steps, a line for each operation and `#### ANSWER`; boxed, the same ending in a box;
            think_answer, the steps between think tags and the answer between answer tags; answer, `#### ANSWER` alone.
        conversational: messages if true, texts if false; then the prompt is the bare sum, `12 + 7 - 3 =`.
        exclude: rows of an earlier call, whose sums do not come again.

    Returns a `datasets.Dataset` with the columns prompt, demonstration, gold (the answer as a text) and difficulty (the
    columns of digits worked on: for each step the digits of its longer number, for a product those of both
    multiplied). A pure function of its arguments; the first rows do not depend on `n`. No sum comes twice, so in a
    large set the short ones run out first.

    Raises ConfigError for a value out of range, or where there are not enough different sums.
    """
    low, high = _range("operands", operands, 2)
    fewest, most = _range("digits", digits, 1)
    if high * most > MOST_DIGITS:
        raise ConfigError(
            f"operands={operands!r} of digits={digits!r} are tasks of up to {high * most} digits; {MOST_DIGITS} "
            "are the most."
        )
    _check_rows(n, high * most)
    if not operators or set(operators) - set(OPERATORS) or len(set(operators)) != len(operators):
        raise ConfigError(f"operators={operators!r} must be different ones of {OPERATORS}, such as '+-'.")
    _check_style(demonstration_style)
    numbers = 10**most - (10 ** (fewest - 1) if fewest > 1 else 0)
    available = sum(numbers**k * len(operators) ** (k - 1) for k in range(low, high + 1))

    def draw(generator):
        count = generator.randint(low, high)
        parts = [str(_number(generator, generator.randint(fewest, most)))]
        for _ in range(count - 1):
            parts += [generator.choice(operators), str(_number(generator, generator.randint(fewest, most)))]
        return " ".join(parts)

    def row(task):
        steps, answer, difficulty = _work_out(task.split())
        question = f"What is {task}?" if conversational else f"{task} ="
        return _task(question, _demonstration(steps, answer, demonstration_style), answer, difficulty, conversational)

    # the style and the form of the prompt do not change which sums are drawn
    name = f"arithmetic {low}-{high} {fewest}-{most} {operators} {seed}"
    pattern = r"What is (.*)\?|(.*) ="
    return _distinct_tasks(
        n, name, draw, row, available, exclude, pattern, "ask for fewer rows, more digits or more operands"
    )


def modular_sum_tasks(
    n: int,
    seed: int,
    terms: tuple[int, int] = (2, 6),
    modulus: int = 10,
    demonstration_style: str = "steps",
    conversational: bool = False,
    exclude: Iterable[dict] = (),
):
    """Make `n` sums modulo a number, easy when short and hard when long: for small models trained from nothing.

    As text, `7+5+9=` with the worked demonstration `7 2 1`: the running sums, the last of which is the answer. The
    characters are those of MODULAR_SUM_CHARACTERS. Without steps a guess is right once in `modulus` times, however
    long the sum; with them, each term adds a step that may fail.

    Args:
        terms: fewest and most terms, from 2 to 200; uniform between. Terms are drawn from 0 to modulus - 1.
        modulus: from 2 to a million.
        demonstration_style: steps, or answer for the answer alone.
        conversational: messages if true; then the prompt says `What is (7 + 5 + 9) mod 10?`.
        exclude: rows of an earlier call, whose sums do not come again.

    Returns a `datasets.Dataset` with the columns prompt, demonstration, gold and difficulty (the number of terms). A
    pure function of its arguments; the first rows do not depend on `n`; no sum comes twice. Raises ConfigError as
    `arithmetic_tasks` does.
    """
    low, high = _range("terms", terms, 2)
    modulus = check_integer("modulus", modulus, 2, 1_000_000)
    _check_rows(n, high)
    if demonstration_style not in ("steps", "answer"):
        raise ConfigError(f"demonstration_style={demonstration_style!r} is neither 'steps' nor 'answer'.")

    def draw(generator):
        return "+".join(str(generator.randrange(modulus)) for _ in range(generator.randint(low, high)))

    def row(task):
        values = [int(value) for value in task.split("+")]
        sums = [total % modulus for total in accumulate(values)]
        question = f"What is ({task.replace('+', ' + ')}) mod {modulus}?" if conversational else f"{task}="
        shown = sums if demonstration_style == "steps" else sums[-1:]
        return _task(question, " ".join(map(str, shown)), str(sums[-1]), len(values), conversational)

    available = sum(modulus**k for k in range(low, high + 1))
    name = f"modular_sum {low}-{high} {modulus} {seed}"
    pattern = r"What is \((.*)\) mod \d+\?|(.*)="
    return _distinct_tasks(
        n, name, draw, row, available, exclude, pattern, "ask for fewer rows, more terms or a larger modulus"
    )


def _check_rows(n: int, size: int) -> None:
    n = check_integer("n", n, 1, MOST_ROWS)
    if n * size > MOST_IN_ALL:
        raise ConfigError(f"n={n} tasks of {size} digits or terms are too many: {MOST_IN_ALL // size} are the most.")


def _distinct_tasks(n, name, draw, row, available, exclude, pattern, advice):
    """Draw `n` rows of different tasks. `pattern` finds the task in a prompt; spaces do not count."""
    from datasets import Dataset

    used = {_task_of(row_["prompt"], pattern) for row_ in exclude}
    # Tasks are drawn until a new one comes up, so half of them are left free.
    if n + len(used) > available // 2:
        raise ConfigError(f"n={n} with {len(used)} excluded tasks is too many: there are {available // 2}; {advice}.")
    # a text seeds by its SHA-512, the same in every process
    generator = random.Random(name)
    rows = []
    while len(rows) < n:
        task = draw(generator)
        key = task.replace(" ", "")
        if key not in used:
            used.add(key)
            rows.append(row(task))
    return Dataset.from_list(rows)


def _task_of(prompt, pattern: str) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    found = re.fullmatch(pattern, text)
    return (next(filter(None, found.groups())) if found else text).replace(" ", "")


def _number(generator: random.Random, digits: int) -> int:
    return generator.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _work_out(parts: list[str]) -> tuple[list[str], str, int]:
    """Return the steps as lines, the answer, and the columns of digits worked on."""
    steps, difficulty = [], 0
    while len(parts) > 1:
        at = parts.index("*") if "*" in parts else 1
        left, operator, right = parts[at - 1 : at + 2]
        a, b = int(left), int(right)
        result = str(a * b if operator == "*" else a + b if operator == "+" else a - b)
        steps.append(f"{left} {operator} {right} = {result}")
        lengths = len(str(abs(a))), len(str(abs(b)))
        difficulty += lengths[0] * lengths[1] if operator == "*" else max(lengths)
        parts = [*parts[: at - 1], result, *parts[at + 2 :]]
    return steps, parts[0], difficulty


def _demonstration(steps: list[str], answer: str, style: str) -> str:
    lines = "\n".join(steps)
    return {
        "steps": f"{lines}\n#### {answer}",
        "boxed": f"{lines}\n\\boxed{{{answer}}}",
        "think_answer": f"<think>{lines}</think><answer>{answer}</answer>",
        "answer": f"#### {answer}",
    }[style]


def _task(question: str, demonstration: str, gold: str, difficulty: int, conversational: bool) -> dict:
    if conversational:
        question = [{"role": "user", "content": question}]
        demonstration = [{"role": "assistant", "content": demonstration}]
    return {"prompt": question, "demonstration": demonstration, "gold": gold, "difficulty": difficulty}


def _range(name: str, value, least: int, greatest: int = MOST_DIGITS) -> tuple[int, int]:
    try:
        low, high = plain(list(value))
    except (TypeError, ValueError):
        low = high = None
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in (low, high))
    if not whole or not least <= low <= high <= greatest:
        raise ConfigError(
            f"{name}={shorten(value)} must be two integers, the fewest (at least {least}) and the most (at most "
            f"{greatest})."
        )
    return low, high


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise ConfigError(f"demonstration_style={style!r} is not one of {', '.join(map(repr, STYLES))}.")
