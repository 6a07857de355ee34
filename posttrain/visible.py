"""Texts of others on a console, in a message or a card: what would steer it is written out. Standard library only."""

import re
import unicodedata

# Characters without a shape that texts of many languages need: they join letters.
_JOINERS = "\u200c\u200d"
_HIDDEN_KINDS = ("Cc", "Cf", "Cs", "Zl", "Zp")
_PRINTABLE = re.compile(r"[\n\t -~]*")


def visible(text: str) -> str:
    """Return `text` with control characters, invisible ones and lone surrogates written out; newlines and tabs stay."""
    return text if _PRINTABLE.fullmatch(text) else "".join(map(_visible, text))


def one_line(text) -> str:
    """Return a name, a cell of a table or another's message as one line of visible text."""
    return visible(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def listed(names) -> str:
    """Return names as a line of visible text, with commas between them; `none` for none."""
    return ", ".join(map(one_line, names)) or "none"


def _visible(character: str) -> str:
    if character in "\n\t" or character in _JOINERS or unicodedata.category(character) not in _HIDDEN_KINDS:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def visible_json(text: str) -> str:
    """Return JSON with the same content, of which no character steers a console."""
    return text if _PRINTABLE.fullmatch(text) else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if _visible(character) == character:
        return character
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
