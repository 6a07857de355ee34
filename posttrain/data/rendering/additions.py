"""What a chat template writes into the learned part of an answer, beside the answer's own and the marks of turns."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from posttrain.data.rendering.faults import Fault, short
from posttrain.data.rendering.marks import REASONING
from posttrain.data.rendering.round_trips import bare

TAG = re.compile(r"</?(?:think|thinking|reasoning)>")
_TAGS = re.compile(rf"(?:{TAG.pattern}|\s)*")
# Tokens that mark turns, in models whose tokenizer calls them ordinary ones too.
_TOKEN = re.compile(
    r"<[|｜][^<>\n]{1,60}>|<[^<>\n]{1,60}[|｜]>|</?s>|<(?:start|end)_of_(?:turn|image)>|<[be]os>|\[/?[A-Z_]+\]"
)
# What stands between the tokens of a turn's beginning: who speaks, and where to.
_HEADER = re.compile(r"\s*(?:\w{1,20}:?)?(?:\s*to=[\w.]+)?\s*(?:\n|$)")
_OPENING = re.compile(r"<(?:think|thinking|reasoning)>\s*$")
_CLOSING = re.compile(r"^\s*</(?:think|thinking|reasoning)>")
_THOUGHT = re.compile(r"\s*(<think>)?((?:(?!</?think>).)*)</think>", re.DOTALL)
_SENTENCE_ENDS = ".!?:;…。！？\"')"
_QUOTED = re.compile(r"``|\"\"|''|“”|‘’|«»|„“|\(\)|\[\]|\*\*")


class _Own(NamedTuple):
    """A text of the answer's own: what it is, and its words."""

    is_reasoning: bool
    text: str


def added(learned: str, answer: list[Mapping], control: Iterable[str] = ()) -> list[str]:
    """Return the texts in what is learned of an answer that are neither the answer's own nor the marks of a turn.

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


def faults(
    prompt: list, answers: Mapping[str, list], learned: Mapping[str, str], control: Iterable[str], rendered: Callable
) -> Iterator[Fault]:
    """Tell what a template writes into the answers of a row, and what it makes of tags that enclose no thought.

    Args:
        prompt: the messages before the answers. answers: the messages of each, by its column. learned: the tokens of
            each as text.
        control: the tokenizer's control tokens.
        rendered: the text of messages with a setting of the template off: `rendered(messages, setting, **options)`.
    """
    sides: dict[str, list[str]] = {}
    for name, answer in answers.items():
        texts = added(learned.get(name, ""), answer, control)
        misread = list(_misread_faults(answer, learned.get(name, ""), texts))
        yield from misread
        for text in dict.fromkeys(() if misread else texts):
            sides.setdefault(text, []).append(name)
    for text, names in sides.items():
        alone = "" if len(names) == len(answers) else names[0]
        which = "answers, and it is learned with them"
        if alone:
            which = f"the {alone} answer alone, which tells the sides apart"
        remedy = _remedy(text, prompt, answers, rendered) or (
            "It is learned as the answer's own words are."
            if alone or not TAG.search(text)
            else "It is the template's design; the model learns to write it."
        )
        what = f"the chat template adds {short(text)!r} to {which}"
        yield Fault(("added", text, alone), what, repr(short(learned.get(names[0], ""))), remedy, is_note=not alone)


def misreads(content: str) -> str | None:
    """Tell how a text with tags of reasoning is none that begins with a thought: `mentions` or `unclosed`.

    Else None.
    """
    if "</think>" not in content:
        return "unclosed" if content.lstrip().startswith("<think>") else None
    thought = _THOUGHT.match(content)
    if thought is None or TAG.search(content, thought.end()):
        return "mentions"
    if thought[1]:
        return None
    before, behind = thought[2].rpartition("\n")[2], content[thought.end() :].partition("\n")[0]
    if _QUOTED.fullmatch(f"{before[-1:]}{behind[:1]}"):
        return "mentions"
    # what opened in the generation prompt is closed behind a sentence, on a line of its own, or without a blank
    is_within = before.strip() and behind.strip() and (before[-1].isspace() or behind[0].isspace())
    return "mentions" if is_within and before.rstrip()[-1] not in _SENTENCE_ENDS else None


def _misread_faults(answer: list, learned: str, texts: list[str]) -> Iterator[Fault]:
    for message in answer:
        content = message.get("content")
        if not isinstance(content, str) or message.get("role") != "assistant":
            continue
        how, is_whole = misreads(content), bare(content) in bare(learned)
        if how == "mentions" and (not is_whole or any("<think>" in text and "</think" not in text for text in texts)):
            yield Fault(
                ("mentions",),
                "the chat template takes an answer that speaks of </think>, or has it more than once, for one thought",
                repr(short(content)),
                "It moves or drops the words before it. Write the tag in another way, with a space in it, say, or "
                "leave those rows out.",
                True,
            )  # fmt: skip
        elif how == "unclosed" and any("</think>" in text for text in texts):
            yield Fault(
                ("unclosed",),
                "the chat template puts a thought of its own in front of an answer that opens one and never closes it",
                repr(short(learned)),
                "Such answers were cut off, as a rule: close the thought, or leave those rows out.",
            )


def _remedy(text: str, prompt: list, answers: Mapping[str, list], rendered: Callable) -> str | None:
    """Tell what to set so that the template puts a text into the prompt, or leaves it out; None where nothing does."""
    for setting in ("enable_thinking", "thinking"):
        try:
            begun = rendered(prompt, setting, add_generation_prompt=True)
            wholes = [rendered([*prompt, *answer], setting) for answer in answers.values()]
        # it may know the setting in another form
        except Exception:
            continue
        if all(whole.startswith(begun) and text not in whole[len(begun) :] for whole in wholes):
            return (
                f"`{setting}: false` in the rows' chat_template_kwargs puts it into the prompt, or leaves it out, if "
                "it is not to be."
            )
    return None


def _own(answer: list[Mapping]) -> list[_Own]:
    """Return the texts of an answer in the order in which they are said."""
    found = []
    for turn in answer:
        found += [_Own(True, turn[key]) for key in REASONING if isinstance(turn.get(key), str) and turn[key].strip()]
        content = turn.get("content")
        texts = [content] if isinstance(content, str) else [block.get("text") for block in content or ()]
        found += [_Own(False, text) for text in texts if isinstance(text, str) and text.strip()]
    return found


def _last(hay: str, wanted: str, end: int, fixed: list[tuple[int, int]]) -> int | None:
    """Find where a text stands last before `end`, cutting through no token and no tag."""
    begin = hay.rfind(wanted, 0, end)
    while begin >= 0:
        stop = begin + len(wanted)
        if not any(a < begin < b or a < stop < b for a, b in fixed):
            return begin
        begin = hay.rfind(wanted, 0, begin + len(wanted) - 1)
    return None


def _parts(between: str, known: re.Pattern, is_first: bool) -> list[str]:
    """Return the texts between tokens, without who speaks: behind a token, or where what is learned begins, before
    one.
    """
    parts, at = [], 0
    for match in [*known.finditer(between), None]:
        part = between[at : match.start() if match else len(between)]
        if at or (is_first and match):
            header = _HEADER.match(part)
            part = part[header.end() :] if header else part
        parts += [part.strip()] if part.strip() else []
        at = match.end() if match else at
    return parts
