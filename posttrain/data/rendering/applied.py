"""Control tokens in what people wrote: texts with the chat template already applied, and tokens within a message."""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from posttrain.data.objects import quietly_mapped
from posttrain.data.rendering import closers

# Columns of texts, those that end with an answer last.
_ANSWERS = ("chosen", "rejected", "completion", "text", "demonstration")
_TEXTS = ("prompt", *_ANSWERS)
# Tokens by which well-known models mark turns. To a tokenizer that does not know them they are letters.
_WELL_KNOWN = re.compile(
    r"<\|im_(?:start|end)\|>|<(?:start|end)_of_turn>|<\|(?:eot_id|eom_id|begin_of_text|end_of_text|start_header_id"
    r"|end_header_id|endoftext|user|assistant|system|end|return)\|>|<\|(?:START|END)_OF_TURN_TOKEN\|>"
    r"|<｜(?:User|Assistant|begin▁of▁sentence|end▁of▁sentence)｜>|\[/?INST\]|<</?SYS>>"
)
# as `<s>` is HTML's too, only where a text ends
_WELL_KNOWN_ENDS = re.compile(rf"(?:{_WELL_KNOWN.pattern}|</s>|<eos>)\s*$")


def control_tokens(tokenizer) -> list[str]:
    """Return the texts that the tokenizer reads as one token with a meaning of its own, wherever they stand.

    Longest first.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)


def added_beginning(tokenizer) -> str | None:
    """Return the token that the tokenizer itself puts in front of a text; None where it puts none."""
    if tokenizer.bos_token_id is None:
        return None
    return tokenizer.bos_token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None


def adds_end(tokenizer) -> bool:
    """Tell whether the tokenizer itself puts the end of sequence behind a text."""
    return tokenizer.eos_token_id is not None and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]


def without_beginning(text: str, beginning: str | None) -> str:
    """Return a text without the token that the tokenizer puts in front of it anyway; None: it puts none."""
    if beginning and text.lstrip().startswith(beginning):
        return text.lstrip().removeprefix(beginning)
    return text


def without_doubles(dataset, tokenizer, marks: bool = True):
    """Make texts begin and end once, where the template was applied to them before.

    TRL appends the end of sequence to answers that do not end with it: blanks behind it are left out, so that it is
    found there, and answers that end with an end of turn are named in a column, for `closers.parted` to take off what
    TRL appends. An end that stands there several times is left once. The tokenizer puts its own beginning in front of
    a text: the one that is written there is left out. Where it puts its own end behind a text, all answers are named.

    Args:
        dataset: a `datasets.Dataset` or a stream; conversational rows stay as they are, and where nothing is to be
            done it is the data set itself.
        marks: name such answers; False where TRL does not tokenise them, and the rows go to rewards as they are.
    """
    beginning, ends, ended = added_beginning(tokenizer), _ends(tokenizer), adds_end(tokenizer)
    clean = functools.partial(_without_doubles, ends=ends, beginning=beginning)
    mark = functools.partial(_marked, ends=ends, beginning=beginning, ended=ended) if marks else clean
    features = dataset.features or {}
    # without a beginning of the tokenizer's own, only the ends of answers are looked at
    read = _TEXTS if beginning else _ANSWERS if ends else ()
    names = [name for name in read if getattr(features.get(name), "dtype", None) in ("string", "large_string")]
    if not hasattr(dataset, "__len__"):
        return dataset.map(mark) if names or not features else dataset
    if not names or not len(dataset) or dataset.format["type"] == "custom":
        return dataset
    columns = dataset.with_format(None).select_columns(names)
    if marks and any(closers.ended(clean(row), ends[1:], ended) for row in columns):
        return quietly_mapped(dataset, mark)
    if not any(clean(row) != row for row in columns):
        return dataset
    return quietly_mapped(dataset, clean)


def clean_row(row: Mapping, tokenizer) -> dict:
    """Return one row as `without_doubles` leaves it, with the names of the texts that end with an end of turn."""
    return _marked(row, _ends(tokenizer), added_beginning(tokenizer), adds_end(tokenizer))


def _ends(tokenizer) -> tuple[str, ...]:
    """Return the end of sequence, and behind it the ends of turns; none where there is no end of sequence to append."""
    if not tokenizer.eos_token:
        return ()
    return (tokenizer.eos_token, *closers.closers(tokenizer, control_tokens(tokenizer)))


def _marked(row: Mapping, ends: tuple[str, ...], beginning: str | None, ended: bool) -> dict:
    row = _without_doubles(row, ends, beginning)
    return row | {closers.COLUMN: closers.ended(row, ends[1:], ended)}


def _without_doubles(row: Mapping, ends: tuple[str, ...], beginning: str | None) -> dict:
    row = dict(row)
    for name in _ANSWERS:
        text = row.get(name)
        stripped = text.rstrip() if isinstance(text, str) else ""
        end = next((end for end in ends if stripped.endswith(end)), None)
        if end is not None:
            before = stripped.removesuffix(end)
            while before.rstrip().endswith(end):
                before = before.rstrip().removesuffix(end)
            row[name] = before + end
    # what comes first: the prompt, or where there is none the answer
    first = ("prompt",) if isinstance(row.get("prompt"), str) and row["prompt"] else _ANSWERS
    for name in first:
        text = row.get(name)
        if isinstance(text, str):
            row[name] = without_beginning(text, beginning)
    return row


@dataclass
class ControlTokens:
    """What was counted of control tokens in the texts of rows.

    Attributes:
        rows: with one at all. first: where the first of them is.
        tokens: how many rows have which token.
        framed: rows of texts whose first text begins with one, or an answer ends with one.
        unfinished: rows of texts whose answer has one before its end. first_unfinished: where the first of them is.
        foreign: rows with other models' tokens: anywhere in texts, at the end of messages. first_foreign: where the
            first of them is. foreign_tokens: how many rows have which.
    """

    pattern: re.Pattern | None
    own: frozenset[str] = frozenset()
    rows: int = 0
    first: str = ""
    tokens: Counter = field(default_factory=Counter)
    framed: int = 0
    unfinished: int = 0
    first_unfinished: str = ""
    foreign: int = 0
    first_foreign: str = ""
    foreign_tokens: Counter = field(default_factory=Counter)

    @classmethod
    def of(cls, tokenizer) -> "ControlTokens":
        """Return a count of none yet of a tokenizer's control tokens."""
        tokens = control_tokens(tokenizer)
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        return cls(pattern, frozenset({*tokens, *added, *_known(tokenizer)}))

    def look(self, parts: Mapping[str, Iterable[str]], place: str, is_text: bool) -> None:
        """Count a row: the texts of its prompt (`prompt`) and of its answers (their names)."""
        parts = {name: list(texts) for name, texts in parts.items()}
        self._look_for_foreign(parts, place, is_text)
        if self.pattern is None:
            return
        found = {name: [self.pattern.findall(text) for text in texts] for name, texts in parts.items()}
        tokens = {token for per_text in found.values() for one in per_text for token in one}
        if not tokens:
            return
        self.rows += 1
        self.first = self.first or place
        self.tokens.update(tokens)
        if is_text:
            begins = [text for texts in parts.values() for text in texts][:1]
            ends = [text for name, texts in parts.items() if name != "prompt" for text in texts]
            self.framed += any(self.pattern.match(text.lstrip()) for text in begins) or any(
                self._without_end(text) != text.rstrip() for text in ends
            )
            inner = any(
                self.pattern.search(self._without_end(text))
                for name, texts in parts.items()
                if name not in ("prompt", "text")
                for text in texts
            )
            self.unfinished += inner
            self.first_unfinished = self.first_unfinished or (place if inner else "")

    def _look_for_foreign(self, parts: Mapping[str, list[str]], place: str, is_text: bool) -> None:
        found = {
            match[0].strip()
            for name, texts in parts.items()
            for text in (texts if name != "tools" else ())
            for pattern in ((_WELL_KNOWN, _WELL_KNOWN_ENDS) if is_text else (_WELL_KNOWN_ENDS,))
            for match in pattern.finditer(text)
        } - self.own
        if found:
            self.foreign += 1
            self.first_foreign = self.first_foreign or place
            self.foreign_tokens.update(found)

    def _without_end(self, text: str) -> str:
        """Return a text without the control tokens and blanks at its end."""
        end = len(text.rstrip())
        for match in reversed(list(self.pattern.finditer(text))):
            if match.end() != end:
                break
            end = len(text[: match.start()].rstrip())
        return text[:end]

    def say(self, name: str, rows: int, unit: str, is_text: bool, tokenizer) -> tuple[list[str], list[str]]:
        """Collect warnings and notes about what was counted in the `rows` of a data set."""
        warnings, notes = self._own_findings(name, rows, unit, is_text, tokenizer)
        if self.foreign:
            often = ", ".join(f"{token!r}" for token, _ in self.foreign_tokens.most_common(4))
            more = f" and {len(self.foreign_tokens) - 4} others" if len(self.foreign_tokens) > 4 else ""
            warnings.append(
                f"{name}: {self.foreign} of {rows} {unit} hold tokens of another model's chat template ({often}{more}; "
                f"first: {self.first_foreign}), which this tokenizer reads as letters: they are learned as words, and "
                "end no turn. Give the rows as messages, or as texts with this model's template applied."
            )
        return warnings, notes

    def _own_findings(self, name: str, rows: int, unit: str, is_text: bool, tokenizer) -> tuple[list[str], list[str]]:
        if not self.rows:
            return [], []
        often = ", ".join(f"{token!r}" for token, _ in self.tokens.most_common(4))
        more = f" and {len(self.tokens) - 4} others" if len(self.tokens) > 4 else ""
        if is_text and 2 * self.framed >= rows:
            notes = [
                f"{name}: {self.rows} of {rows} {unit} hold control tokens ({often}{more}; first: {self.first}), so "
                "the chat template was applied to them already. They are taken as they are; a beginning or end that "
                "would stand there twice is left once."
            ]
            warnings = []
            if self.unfinished:
                warnings = [
                    f"{name}: in {self.unfinished} of {rows} {unit} an answer has control tokens before its end "
                    f"({often}{more}; first: {self.first_unfinished}), so it holds several turns, all of which are "
                    "learned. Move the turns up to the last one into the prompt."
                ]
            return warnings, notes
        split = ""
        if hasattr(tokenizer, "split_special_tokens"):
            split = " (`split_special_tokens` of the tokenizer would split the chat template's own tokens too)"
        return [
            f"{name}: {self.rows} of {rows} {unit} hold control tokens in their texts ({often}{more}; first: "
            f"{self.first}). Each becomes the token itself, as if the turn ended or began there. Write it in another "
            f"way, with a space in it, say, or leave those rows out{split}."
        ], []


def _known(tokenizer) -> set[str]:
    """Return those of the well-known tokens that the tokenizer has in its vocabulary or its chat template, special
    or not.
    """
    template = _WELL_KNOWN_ENDS.pattern.removesuffix(r"\s*$")
    written = re.findall(template, str(getattr(tokenizer, "chat_template", None) or ""))
    return {*written, *(token for token in tokenizer.get_vocab() if _WELL_KNOWN_ENDS.fullmatch(token))}
