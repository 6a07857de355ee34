"""Texts that end with the end of their turn: the end of sequence that TRL appends behind it is taken off again."""

import contextlib
import re
from collections.abc import Mapping

from posttrain.data import objects

# Holds, from `marked` to `parted`, which texts of a row end with an end of turn.
COLUMN = "ended_texts"
_SIDES = ("chosen", "rejected", "completion", "text")
_TOKENS = {"chosen": ("chosen_ids",), "rejected": ("rejected_ids",)}
_OF_ANSWERS = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks")
# Names of tokens that end a turn and nothing else, for texts in another format than the tokenizer's template.
_ENDS = re.compile(r"<\|?(im_end|end_of_turn|eot_id|eot|eom_id|end|END_OF_TURN_TOKEN|return|call)\|?>|<turn\|>")
# Behind the name of a text that gets two ends of sequence
_TWICE = "*"
_MARK = "qzanswerzq"


def closers(tokenizer, control: list[str]) -> tuple[str, ...]:
    """Return the control tokens, other than the end of sequence, that end a turn: in the chat template, or by their
    name.

    `control`: all control tokens, longest first.
    """
    found = {token for token in control if _ENDS.fullmatch(token)}
    pattern = re.compile("|".join(map(re.escape, control))) if control else None
    if pattern is not None and getattr(tokenizer, "chat_template", None):
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}
        for messages in ([user, answer], [user, answer, user]):
            # a template can refuse anything
            with contextlib.suppress(Exception):
                behind = tokenizer.apply_chat_template(messages, tokenize=False).partition(_MARK)[2]
                first = pattern.match(behind.lstrip())
                found |= {first[0]} if first else set()
    return tuple(sorted(found - {tokenizer.eos_token, tokenizer.bos_token}))


def ended(row: Mapping, closers: tuple[str, ...], twice: bool = False) -> str:
    """Return the names of the row's texts that end with an end of turn, with commas; empty where none does.

    `twice`: the tokenizer appends the end of sequence as TRL does; all texts are then named, marked so.
    """
    texts = [name for name in _SIDES if isinstance(row.get(name), str)]
    names = [name + _TWICE for name in texts if twice]
    return ",".join(names + [name for name in texts if row[name].endswith(closers or ("\0",))])


def parted(dataset, eos: int | None):
    """Return the data set that TRL tokenised, without the end of sequence that it appended behind ends of turns.

    `eos`: the id of the end of sequence.
    """
    columns = getattr(dataset, "column_names", None)
    if eos is None or not (COLUMN in columns if columns else hasattr(dataset, "map") and columns is None):
        return dataset
    from datasets import Features

    options = {}
    if dataset.features:
        options["features"] = Features({k: v for k, v in dataset.features.items() if k != COLUMN})
    return objects.quietly_mapped(dataset, without_appended, fn_kwargs={"eos": eos}, remove_columns=[COLUMN], **options)


def without_appended(row: Mapping, eos: int) -> dict:
    """Return a tokenised row without the end of sequence behind the texts that `ended` named, and without their
    names.
    """
    row = dict(row)
    for name in filter(None, (row.pop(COLUMN, None) or "").split(",")):
        appended = [eos, eos] if name.endswith(_TWICE) else [eos]
        columns = [column for column in _TOKENS.get(name.removesuffix(_TWICE), _OF_ANSWERS) if column in row]
        if columns and row[columns[0]][-len(appended) :] == appended:
            row |= {column: row[column][:-1] for column in columns}
    return row
