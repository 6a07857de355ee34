"""Prompts that stand in the answers once more: at their beginning, behind a header, or in a message's text."""

import re
from collections.abc import Mapping

# Characters, blanks left out, that a prompt must have before an answer that holds it is no chance.
LONG = 16
# Characters that may stand in front of it: a header, or the words that introduce an instruction.
_HEADER = 200
_ASKS = r"(?:user|human|instruction|prompt|input|q|question)"
_SAYS = r"(?:assistant|ai|bot|gpt|model|response|output|a|answer)"
# What stands around a turn of a transcript, without blanks
_BEFORE = re.compile(rf"(?:^|\W){_ASKS}\W{{0,6}}$", re.IGNORECASE)
_BEHIND = re.compile(rf"(?:\W{{0,8}}|\W.{{0,20}}\W){_SAYS}(?:\W{{0,3}}:|\W{{1,8}}|$)", re.IGNORECASE)
BEGINS, TRANSCRIPT, QUOTES = "begins", "transcript", "quotes"


def repeats(prompt, answer) -> str | None:
    """Tell how an answer repeats a prompt: BEGINS with it, as a TRANSCRIPT with labels around it, or QUOTES it early.

    Blanks make no difference. Of messages it is the last question, within the first text of the answer, which can only
    be a transcript or a quote. None: it does not, or the prompt is too short to tell.
    """
    conversational = isinstance(prompt, list)
    asked, said = _last_words(prompt), _first_words(answer)
    if not asked or not said:
        return None
    short = "".join(asked.split())
    if len(short) < LONG:
        return None
    # so much of the answer as can hold it
    said = "".join(said[: 4 * len(asked) + 4 * _HEADER].split())
    at = said.find(short, 0, _HEADER + len(short))
    if at < 0:
        return None
    if not at and not conversational:
        return BEGINS
    if _BEFORE.search(said[:at]) and _BEHIND.match(said[at + len(short) :]):
        return TRANSCRIPT
    return QUOTES


def _last_words(prompt) -> str | None:
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt or () if isinstance(turn, Mapping) and turn.get("role") == "user"]
    content = turns[-1].get("content") if turns else None
    return content if isinstance(content, str) else None


def _first_words(answer) -> str | None:
    if isinstance(answer, str):
        return answer
    content = answer[0].get("content") if answer and isinstance(answer[0], Mapping) else None
    return content if isinstance(content, str) else None
