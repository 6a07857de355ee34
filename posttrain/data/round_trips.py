"""A text against what a tokenizer or a chat template makes of it: characters, line breaks and indentation."""

import re
import unicodedata
from collections import Counter
from typing import NamedTuple

_TAG = re.compile(r"</?(think|thinking|reasoning)>")
_SHOWN = 6


class Change(NamedTuple):
    """What became of a text: its kind (`unknown`, `characters`, `lines`), and that in words."""

    kind: str
    what: str


def changes(text: str, tokenizer) -> list[Change]:
    """What a tokenizer changes of a text: unknown tokens, characters, line breaks and indentation.

    Blanks within a line and at both ends are left out of the comparison, and so is how an accent is written.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token
    if unknown is not None and ids.count(tokenizer.unk_token_id) > text.count(unknown):
        return [Change("unknown", f"the tokenizer has no token for some characters, and writes {unknown!r}")]
    read = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    given, made = bare(text), bare(read)
    if given != made:
        return [Change("characters", f"the tokenizer changes characters: {_difference(given, made)}")]
    if loses_lines(text, read):
        return [Change("lines", "the tokenizer loses line breaks or indentation within a text")]
    return []


def loses_lines(text: str, rendered: str) -> bool:
    """Whether a text stands in a rendering, and nowhere with its inner line breaks and indentation.

    What stands around the tags of reasoning does not count: templates write it in their own way.
    """
    wanted, hay = bare(text), bare(rendered)
    breaks = [(place, gap) for place, gap in _gaps(text) if 0 < place < len(wanted) and "\n" in gap]
    tags = {end for match in _TAG.finditer(wanted) for end in match.span()}
    breaks = [(place, gap) for place, gap in breaks if place not in tags]
    if not wanted or not breaks or wanted not in hay:
        return False
    there = dict(_gaps(rendered))
    at = hay.find(wanted)
    while at >= 0:
        if all(_keeps(gap, there.get(at + place, "")) for place, gap in breaks):
            return False
        at = hay.find(wanted, at + 1)
    return True


def bare(text: str) -> str:
    """A text without blanks, which templates trim and add."""
    return "".join(unicodedata.normalize("NFC", text).split())


def _gaps(text: str) -> list[tuple[int, str]]:
    """The blanks of a text, each with the number of other characters before it."""
    place, found = 0, []
    for piece in re.findall(r"\s+|\S+", unicodedata.normalize("NFC", text).replace("\r\n", "\n")):
        if piece.isspace():
            found.append((place, piece))
        else:
            place += len(piece)
    return found


def _keeps(gap: str, other: str) -> bool:
    return other.count("\n") >= gap.count("\n") and len(other.split("\n")[-1]) >= len(gap.split("\n")[-1])


def _difference(given: str, made: str) -> str:
    lost, new = Counter(given) - Counter(made), Counter(made) - Counter(given)
    if not lost and not new:
        return "they stand in another order"
    parts = [f"{_listed(lost)} {'is' if len(lost) == 1 else 'are'} lost"] if lost else []
    return " and ".join(parts + ([f"{_listed(new)} written"] if new else []))


def _listed(characters: Counter) -> str:
    shown = ", ".join(map(repr, list(characters)[:_SHOWN]))
    return shown + (f" and {len(characters) - _SHOWN} more" if len(characters) > _SHOWN else "")
