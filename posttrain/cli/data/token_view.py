"""Token sequences on a terminal: the supervised ones coloured, or in brackets where there is no colour."""

import os
import sys
from collections.abc import Sequence

from posttrain.console import say
from posttrain.visible import visible


def pieces(ids: Sequence[int], supervised: Sequence[bool], tokenizer) -> list[tuple[str, bool]]:
    """Return the text of each token with whether it is supervised.

    Tokens that hold parts of one character come as one piece. The texts together are the decoded sequence.
    """
    found, group, before = [], [], []
    for index, (token, mark) in enumerate(zip(ids, supervised, strict=True)):
        group.append(token)
        # A token's text can depend on what comes before it: sentencepiece drops a space at the start
        head = _decode(tokenizer, before)
        text = _decode(tokenizer, before + group)[len(head) :]
        changes = index + 1 < len(ids) and supervised[index + 1] != mark
        if text.endswith("\ufffd") and len(group) < 8 and index + 1 < len(ids) and not changes:
            continue
        found.append((text, bool(mark)))
        before, group = group, []
    return found


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def colour_is_wanted() -> bool:
    """Tell whether stdout is a terminal, and NO_COLOR is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def show(parts: Sequence[tuple[str, bool]], most: int, colour: bool) -> None:
    """Print pieces; of more than `most`, the middle is left out."""
    if len(parts) > most:
        head, tail = parts[: most // 2], parts[len(parts) - most // 2 :]
        _print(head, colour)
        say(f"... {len(parts) - 2 * (most // 2)} tokens left out ...")
        parts = tail
    _print(parts, colour)


def _print(parts: Sequence[tuple[str, bool]], colour: bool) -> None:
    if not colour:
        # Inside brackets a newline is written out, so that a bracket never spans lines
        texts = [f"[{visible(text)}]".replace("\n", "\\n") if mark else visible(text) for text, mark in parts]
        say("".join(texts))
        return
    from rich.console import Console
    from rich.text import Text

    line, supervised = Text(), 0
    for text, mark in parts:
        if mark:
            # Two shades show where one token ends and the next begins
            line.append(visible(text).replace("\n", "\\n"), ("green", "bold bright_green")[supervised % 2])
            supervised += 1
        else:
            line.append(visible(text), "dim")
    Console(highlight=False).print(line, soft_wrap=True)
