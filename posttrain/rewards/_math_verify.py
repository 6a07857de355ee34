"""Maths answers judged by math-verify. Runs in a worker process, which minds the time: see `worker.py`."""

import logging
import re
from functools import lru_cache

import sympy
from math_verify import parse, verify

from posttrain.rewards.answers import Answer, gold_answer, read_number

# It warns of each parse without its own timeout; the worker has one for the whole sample.
logging.getLogger("math_verify").setLevel(logging.ERROR)
logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)

_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_MARKED = re.compile(r"\$|\\\(|\\\[|\\boxed")


def score(answer: str, alone: bool, gold: str) -> float:
    """Return 1.0 where the answer equals the gold one as an expression, 0.0 otherwise."""
    wanted = _gold(gold)
    if not wanted:
        raise ValueError(f"the gold answer {gold!r} cannot be parsed")
    found = _expressions(answer) if alone else _parse(answer)
    return float(verify(wanted, found, timeout_seconds=None, raise_on_error=True))


def accepts_gold(gold: str) -> bool:
    return bool(verify(_gold(gold), _gold(gold), timeout_seconds=None, raise_on_error=True))


def gold_error(gold: str) -> str | None:
    """Tell why a gold answer cannot be used, None if it can."""
    try:
        if _gold(gold) and accepts_gold(gold):
            return None
    except Exception as error:
        return f"math-verify meets {type(error).__name__} on it; write a number, or LaTeX between $ signs."
    return "it is no expression that math-verify can parse; write a number, or LaTeX between $ signs."


@lru_cache(maxsize=4096)
def _gold(gold: str) -> list:
    answer: Answer | None = gold_answer(gold)
    return [] if answer is None else _expressions(answer.text)


def _expressions(text: str) -> list:
    """Parse the expressions of a text that is an answer and nothing else; empty where it is ordinary words."""
    number = read_number(text)
    if number is not None and "%" not in text:
        return _parse(f"${_latex(number)}$")
    if _MARKED.search(text):
        return _parse(text)
    # Unmarked, math-verify would take the first number of 3x^2+1, and letters as a product of variables.
    if _WORD.search(_COMMAND.sub(" ", text)):
        return []
    return _parse(f"${text}$")


def _latex(number) -> str:
    if number.denominator == 1:
        return str(number.numerator)
    decimal = number * 10**12
    if decimal.denominator == 1:
        digits = f"{abs(decimal.numerator):013d}"
        return f"{'-' * (number < 0)}{digits[:-12]}.{digits[-12:].rstrip('0')}"
    return rf"{'-' * (number < 0)}\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


def _parse(text: str) -> list:
    found = parse(text, parsing_timeout=None, raise_on_error=True)
    # 1/0 is an expression to sympy
    return [] if any(one in (sympy.zoo, sympy.nan) for one in found if isinstance(one, sympy.Basic)) else found
