"""What a chat template writes into the learned part of an answer, beside the answer's own texts and the marks of turns."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from posttrain.data.markers import REASONING

TAG = re.compile(r"</?(?:think|thinking|reasoning)>")
_TAGS = re.compile(rf"(?:{TAG.pattern}|\s)*")
# Tokens that mark turns, in models whose tokenizer calls them ordinary ones too.
_TOKEN = re.compile(r"<[|｜][^<>\n]{1,60}>|<[^<>\n]{1,60}[|｜]>|</?s>|<(?:start|end)_of_(?:turn|image)>|<[be]os>|\[/?[A-Z_]+\]")
# What stands between the tokens of a turn's beginning: who speaks, and where to.
_HEADER = re.compile(r"\s*(?:\w{1,20}:?)?(?:\s*to=[\w.]+)?\s*(?:\n|$)")
_OPENING = re.compile(r"<(?:think|thinking|reasoning)>\s*$")
_CLOSING = re.compile(r"^\s*</(?:think|thinking|reasoning)>")
_THOUGHT = re.compile(r"\s*(<think>)?((?:(?!</?think>).)*)</think>", re.DOTALL)
_SENTENCE_ENDS = ".!?:;…。！？\"')"


class _Own(NamedTuple):
    """A text of the answer's own: what it is, and its words."""

    is_reasoning: bool
    text: str


def added(learned: str, answer: list[Mapping], control: Iterable[str] = ()) -> list[str]:
    """The texts in what is learned of an answer that are neither the answer's own nor the marks of a turn.

    Blanks, control tokens, who speaks, and the tags around the answer's own reasoning are none. Of an answer with
    tool calls, whose syntax is the template's, only tags of reasoning are. Empty where a text of the answer is not
    there as it is.

    Args:
        learned: the tokens as text. answer: its messages. control: the tokenizer's control tokens.
    """
    text = unicodedata.normalize("NFC", learned)
    places = [i for i, letter in enumerate(text) if not letter.isspace()]
    hay = "".join(text[i] for i in places)
    known = re.compile("|".join([*map(re.escape, control), _TOKEN.pattern]))
    fixed = [match.span() for pattern in (known, TAG) for match in pattern.finditer(hay)]
    end, spans = len(hay), []
    for own in reversed(_own(answer)):
        wanted = "".join(unicodedata.normalize("NFC", own.text).split())
        begin = _last(hay, wanted, end, fixed)
        if begin is None:
            return []
        spans.append((places[begin], places[begin + len(wanted) - 1] + 1, own.is_reasoning))
        end = begin
    spans.reverse()
    calls = any(turn.get("tool_calls") or turn.get("function_call") or turn.get("role") == "tool" for turn in answer)
    found = []
    for number in range(len(spans) + 1):
        start = spans[number - 1][1] if number else 0
        between = text[start : spans[number][0] if number < len(spans) else len(text)]
        if number and spans[number - 1][2]:
            between = _CLOSING.sub("", between)
        if number < len(spans) and spans[number][2]:
            between = _OPENING.sub("", between)
        parts = _parts(between, known, not number)
        found += [tags for part in parts if (tags := _TAGS.match(part)[0].strip())] if calls else parts
    return found


def misreads(content: str) -> str | None:
    """How a text with tags of reasoning is none that begins with a thought: `mentions` or `unclosed`; else None."""
    if "</think>" not in content:
        return "unclosed" if content.lstrip().startswith("<think>") else None
    thought = _THOUGHT.match(content)
    if thought is None or TAG.search(content, thought.end()):
        return "mentions"
    if thought[1]:
        return None
    before, behind = thought[2].rpartition("\n")[2], content[thought.end() :].partition("\n")[0]
    # what opened in the generation prompt is closed behind a sentence, or on a line of its own
    is_within = before.strip() and behind.strip() and before.rstrip()[-1] not in _SENTENCE_ENDS
    return "mentions" if is_within or before.endswith("`") else None


def _own(answer: list[Mapping]) -> list[_Own]:
    """The texts of an answer in the order in which they are said."""
    found = []
    for turn in answer:
        found += [_Own(True, turn[key]) for key in REASONING if isinstance(turn.get(key), str) and turn[key].strip()]
        content = turn.get("content")
        texts = [content] if isinstance(content, str) else [block.get("text") for block in content or ()]
        found += [_Own(False, text) for text in texts if isinstance(text, str) and text.strip()]
    return found


def _last(hay: str, wanted: str, end: int, fixed: list[tuple[int, int]]) -> int | None:
    """Where a text stands last before `end`, cutting through no token and no tag."""
    begin = hay.rfind(wanted, 0, end)
    while begin >= 0:
        stop = begin + len(wanted)
        if not any(a < begin < b or a < stop < b for a, b in fixed):
            return begin
        begin = hay.rfind(wanted, 0, begin + len(wanted) - 1)
    return None


def _parts(between: str, known: re.Pattern, is_first: bool) -> list[str]:
    """The texts between tokens, without who speaks: behind a token, or where what is learned begins, before one."""
    parts, at = [], 0
    for match in [*known.finditer(between), None]:
        part = between[at : match.start() if match else len(between)]
        if at or (is_first and match):
            header = _HEADER.match(part)
            part = part[header.end() :] if header else part
        parts += [part.strip()] if part.strip() else []
        at = match.end() if match else at
    return parts
