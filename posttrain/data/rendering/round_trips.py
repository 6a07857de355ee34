"""A text against what a tokenizer or a chat template makes of it: characters, line breaks, indentation and blanks."""

import functools
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

_TAG = re.compile(r"</?(think|thinking|reasoning)>")
_SHOWN = 6


class Change(NamedTuple):
    """What became of a text: its kind (`unknown`, `characters`, `lines`, `blanks`), and that in words."""

    kind: str
    what: str


def changes(text: str, tokenizer) -> list[Change]:
    """Tell what a tokenizer changes of a text: unknown tokens, characters, line breaks, indentation, tabs, runs of
    blanks.

    Blanks at both ends, and more of them than there were, are no change, and neither is how an accent is written.
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
    # around some control tokens blanks are left out, and such tokens in a text are said elsewhere
    if loses_blanks(text, read) and not any(t.content in text for t in tokenizer.added_tokens_decoder.values()):
        return [Change("blanks", "the tokenizer loses tabs or blanks within a line")]
    return []


def loses_lines(text: str, rendered: str) -> bool:
    """Tell whether a text stands in a rendering, and nowhere with its inner line breaks and indentation.

    What stands around the tags of reasoning does not count: templates write it in their own way.
    """
    return _loses(text, rendered, lambda gap, before, behind: "\n" in gap, _keeps)


def loses_blanks(text: str, rendered: str) -> bool:
    """Tell whether a text stands in a rendering, and nowhere with its tabs, runs of blanks, and blanks between words.

    A single blank beside a punctuation mark does not count, nor what stands around the tags of reasoning.
    """
    return _loses(text, rendered, _is_plain_gap, _keeps_blanks)


def _loses(text: str, rendered: str, counts, keeps) -> bool:
    """Tell whether each place where a text stands in a rendering has a gap that `counts`, and is not kept there."""
    wanted = bare(text)
    hay, there = _read(rendered)
    tags = {end for match in _TAG.finditer(wanted) for end in match.span()}
    gaps = [
        (place, gap)
        for place, gap in _gaps(text)
        if 0 < place < len(wanted) and place not in tags and counts(gap, wanted[place - 1], wanted[place])
    ]
    if not wanted or not gaps or wanted not in hay:
        return False
    at = hay.find(wanted)
    while at >= 0:
        if all(keeps(gap, there.get(at + place, "")) for place, gap in gaps):
            return False
        at = hay.find(wanted, at + 1)
    return True


def bare(text: str) -> str:
    """Return a text without blanks, which templates trim and add."""
    return "".join(unicodedata.normalize("NFC", text).split())


@functools.lru_cache(maxsize=2)
def _read(rendered: str) -> tuple[str, dict[int, str]]:
    """Return a rendering without blanks, and its blanks; kept, as one is read for each of its messages."""
    return bare(rendered), dict(_gaps(rendered))


def _gaps(text: str) -> list[tuple[int, str]]:
    """Return the blanks of a text, each with the number of other characters before it."""
    place, found = 0, []
    for piece in re.findall(r"\s+|\S+", unicodedata.normalize("NFC", text).replace("\r\n", "\n")):
        if piece.isspace():
            found.append((place, piece))
        else:
            place += len(piece)
    return found


def _keeps(gap: str, other: str) -> bool:
    return other.count("\n") >= gap.count("\n") and len(other.split("\n")[-1]) >= len(gap.split("\n")[-1])


def _is_plain_gap(gap: str, before: str, behind: str) -> bool:
    return "\n" not in gap and (len(gap) > 1 or gap == "\t" or (before.isalnum() and behind.isalnum()))


def _keeps_blanks(gap: str, other: str) -> bool:
    return len(other) >= len(gap) and other.count("\t") >= gap.count("\t")


def _difference(given: str, made: str) -> str:
    lost, new = Counter(given) - Counter(made), Counter(made) - Counter(given)
    if not lost and not new:
        return "they stand in another order"
    parts = [f"{_listed(lost)} {'is' if len(lost) == 1 else 'are'} lost"] if lost else []
    return " and ".join(parts + ([f"{_listed(new)} written"] if new else []))


def _listed(characters: Counter) -> str:
    shown = ", ".join(map(repr, list(characters)[:_SHOWN]))
    return shown + (f" and {len(characters) - _SHOWN} more" if len(characters) > _SHOWN else "")
