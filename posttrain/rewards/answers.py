r"""Finding the final answer in a completion, and reading it as an exact number.

Where the answer is (`answer_in`):
    tag     inside the last `<answer>...</answer>`
    boxed   inside the last `\boxed{...}`
    hash    after the last `####`, to the end of its line, as in GSM8K
    last    the whole text, whose last number is the answer
    auto    the first of these that is there, looked for in this order; `boxed` and `hash` inside a tag too
Text up to a closing `</think>` is never looked at, and a `<think>` that is not closed holds no answer.

Numbers: 1234, 1,234.50, -.5, +7, 1e3, 3/4, 2 3/4, \frac{3}{4}, 2\frac{3}{4}; before them a sign or $, after them %
(dropped: 50% is 50) or words as units. They are compared as fractions, so 0.5 is 1/2 and 0.333 is not 1/3.
"""

import re
from fractions import Fraction
from typing import NamedTuple

PLACES = ("auto", "tag", "boxed", "hash", "last")

# Digits of one number, so that no text makes Python compute for long.
_MOST_DIGITS = 1000
_LARGEST_EXPONENT = 400

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?![\w.]))?"
_NUMBER = re.compile(
    # not inside a word, nor the end of 3.14.15; a sign after a number is an operator
    r"(?<![\w.])(?P<sign>(?:(?<![\w)}\]])[-+\u2212])?)(?:\\?\$)?(?P<inner>[-\u2212]?)"
    rf"(?:(?:(?P<whole>\d+)\s*)?\\[dt]?frac\{{(?P<fn>-?\d+)\}}\{{(?P<fd>\d+)\}}"
    rf"|(?:(?P<mixed>\d+)\s+)?(?P<n>{_DECIMAL})\s*/\s*(?P<d>{_DECIMAL})(?!\s*/)"
    rf"|(?P<decimal>{_DECIMAL}))"
)
# What may stand beside the one number of an answer: words that are no Greek letters, and marks without a meaning.
_UNITS = re.compile(
    r"(?:(?![\u0370-\u03ff])[^\W\d_]|[\s.,:;=%$\u00b0\u20ac\u00a3]"
    r"|\\[%$,!; ]|\\(?:text|mathrm|textbf|mathbf)\{|\}|\\\(|\\\))*"
)
# a box's opening brace, an escaped character, any other brace
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


class Answer(NamedTuple):
    """The text of an answer; `alone` where it was marked as the answer, not just the text it is somewhere in."""

    text: str
    alone: bool


def final_answer(text: str, answer_in: str = "auto") -> Answer | None:
    """Return the answer in a completion's text, None where there is none. `answer_in`: see the module."""
    text = _after_thinking(text)
    if text is None or not text.strip():
        return None
    if answer_in == "last":
        return Answer(text, alone=False)
    finders = {"tag": _in_tag, "boxed": _in_box, "hash": _after_hash}
    if answer_in != "auto":
        found = finders[answer_in](text)
        return None if found is None else Answer(found.strip(), alone=True)
    tag = _in_tag(text)
    inside = text if tag is None else tag
    for found in (_in_box(inside), _after_hash(inside), tag):
        if found is not None:
            return Answer(found.strip(), alone=True)
    return Answer(text, alone=False)


def answer_number(answer: Answer | None) -> Fraction | None:
    """Return the number that an answer is, or, in a text that is not just the answer, its last one."""
    if answer is None:
        return None
    if answer.alone:
        return read_number(answer.text)
    numbers = [match for match in _NUMBER.finditer(answer.text) if _value(match) is not None]
    return _value(numbers[-1]) if numbers else None


def read_number(text: str) -> Fraction | None:
    """Return the one number of a text, which may have units.

    None where there is none, several, or other mathematics.
    """
    matches = list(_NUMBER.finditer(text))
    if len(matches) != 1:
        return None
    match = matches[0]
    rest = (text[: match.start()], text[match.end() :])
    if not all(_UNITS.fullmatch(part) for part in rest):
        return None
    return _value(match)


def gold_answer(value) -> Answer | None:
    """Read a gold answer: a number, an expression, or a worked solution that marks its answer by a box or ####."""
    if value is None or isinstance(value, bool):
        return None
    answer = final_answer(str(value))
    return None if answer is None or not answer.text.strip() else Answer(answer.text.strip(), alone=True)


def _value(match: re.Match) -> Fraction | None:
    if len(match.group()) > _MOST_DIGITS:
        return None
    negative = (match["sign"] in ("-", "\u2212")) != bool(match["inner"])
    try:
        if match["fd"]:
            value = Fraction(int(match["fn"]), int(match["fd"])) + int(match["whole"] or 0)
        elif match["d"]:
            value = _decimal(match["n"]) / _decimal(match["d"]) + int(match["mixed"] or 0)
        else:
            value = _decimal(match["decimal"])
    except (ZeroDivisionError, OverflowError):
        return None
    return -value if negative else value


def _decimal(text: str) -> Fraction:
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    if exponent and abs(int(exponent)) > _LARGEST_EXPONENT:
        raise OverflowError
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def _after_thinking(text: str) -> str | None:
    start, end = text.rfind("<think>"), text.rfind("</think>")
    if start > end:
        return None
    return text if end < 0 else text[end + len("</think>") :]


def _in_tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end]


def _in_box(text: str) -> str | None:
    """Return the content of the last box that is closed."""
    opened, found = [], None
    for brace in _BRACE.finditer(text):
        if brace.group().endswith("{") and brace.group() != r"\{":
            opened.append(brace)
        elif brace.group() == "}" and opened:
            start = opened.pop()
            if start.group() != "{" and (found is None or start.end() > found[0]):
                found = start.end(), brace.start()
    return None if found is None else text[slice(*found)]


def _after_hash(text: str) -> str | None:
    start = text.rfind("####")
    if start < 0:
        return None
    found = text[start + 4 :].lstrip("#").partition("\n")[0]
    return found if found.strip() else None
