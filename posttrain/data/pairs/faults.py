"""The values of preference pairs, row by row: what TRL would fall over, and what teaches nothing."""

from collections import Counter
from collections.abc import Iterable, Mapping

from posttrain.data import formats
from posttrain.data.messages import described, is_empty, style_of
from posttrain.errors import DataError

_SIDES = ("chosen", "rejected")
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
# Whose turn an answer comes behind
_ASKING = ("system", "developer", "user", "tool")
# What is counted, in words, and what to do about it.
_FAULTS = {
    "function_call": (
        "an answer that is a call in the key function_call, which chat templates do not read, beside empty content",
        'Write it as tool_calls: [{"type": "function", "function": {"name": ..., "arguments": ...}}]',
    ),
    "empty": ("an empty side", "Fill it in, or leave those rows out"),
    "identical": ("identical sides", "There is no preference to learn in them; leave those rows out"),
    "prefix": (
        "a side that is the beginning of the other, and no column for the prompt",
        "All of that side but its end is taken for the prompt; add a column prompt",
    ),
    "no_prompt": ("no prompt", "Add a column prompt, or let both sides begin with it"),
    "answerer": ("an answer whose last message is not the assistant's", "It is trained on all the same; mend its role"),
    "role": (
        f"a message with another role than {', '.join(_KNOWN_ROLES)}",
        "A chat template may drop it; mend the role",
    ),
}
# Said, but not refused where every row has them: a chat template can have roles of its own.
_ONLY_SAID = ("prefix", "answerer", "role")
COLUMNS = ("prompt", *_SIDES, "messages", "completion", "chat_template_kwargs", *formats.TOKEN_COLUMNS)


def scan_pairs(rows: Iterable[tuple[str, Mapping]], name: str) -> tuple[Counter, list[str]]:
    """Look at every value of preference pairs: texts, lists of messages, or token ids.

    `rows`: each with the words that say where it is. `name`: the data set's, for messages. Returns how many rows there
    are (`rows`), and with an `empty` side, `identical` sides and `no_prompt`, and a sentence about each that is not 0.

    Raises DataError for a value of the wrong type, with its row, and where all pairs have an empty side, identical
    sides, or no prompt in a data set that has no such column.
    """
    first: dict[str, str] = {}
    counts: Counter = Counter()
    styles: dict[str, tuple[str, str]] = {}
    has_prompt = False
    for place, row in rows:
        counts["rows"] += 1
        has_prompt |= "prompt" in row or "prompt_ids" in row
        for fault in faults(row, place, styles):
            counts[fault] += 1
            first.setdefault(fault, place)
    total, warnings = counts["rows"], []
    for fault, (what, advice) in _FAULTS.items():
        if counts[fault] == 0:
            continue
        refused = fault not in _ONLY_SAID and not (fault == "no_prompt" and has_prompt)
        if counts[fault] == total and refused:
            raise DataError(f"{name}: all {total} pairs have {what}. {advice}.")
        warnings.append(f"{name}: {counts[fault]} of {total} pairs have {what} (first: {first[fault]}). {advice}.")
    return counts, warnings


def read_values(dataset) -> Iterable[dict]:
    """Return the rows of a `datasets.Dataset` with the columns that `scan_pairs` looks at."""
    for batch in dataset.select_columns([name for name in COLUMNS if name in dataset.column_names]).iter(1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def faults(row: Mapping, place: str, styles: dict | None = None) -> list[str]:
    """Return the faults of a row of preference pairs that are counted; DataError for one that TRL would fall over.

    `styles` remembers, from row to row, what kind of value each column holds.
    """
    if "prompt_ids" in row:
        return _faults_of_tokens(row, place)
    styles = {} if styles is None else styles
    explicit = "prompt" in row
    for column in ("prompt", *_SIDES) if explicit else _SIDES:
        style = style_of(row.get(column), column, place)
        known, where = styles.setdefault(column, (style, place))
        if style != known:
            raise DataError(
                f"{place}: {column} is {style}, and in {where} it is {known}; all rows must have the same kind."
            )
        _check_same_kind(column, style, styles, place)
    for column in ("messages", "completion"):
        # TRL takes any of these columns to tell texts from messages
        if column in row and formats.is_messages(row[column]) != formats.is_messages(row["chosen"]):
            raise DataError(
                f"{place}: the column {column} is of another kind than chosen, which would mislead TRL. It is not "
                f'needed here:\n  dataset = dataset.remove_columns("{column}")'
            )
    if not isinstance(row.get("chat_template_kwargs") or {}, Mapping):
        raise DataError(
            f"{place}: chat_template_kwargs is {described(row['chat_template_kwargs'])}; it must be an object, or "
            "null for none."
        )
    chosen, rejected = row["chosen"], row["rejected"]
    found = []
    empty = [side for side in (chosen, rejected) if is_empty(side)]
    if any(isinstance(side, str) or not side[-1].get("function_call") for side in empty):
        found.append("empty")
    elif empty:
        found.append("function_call")
    if chosen == rejected:
        found.append("identical")
    messages = [value for value in (row.get("prompt"), chosen, rejected) if formats.is_messages(value)]
    if any(side[-1]["role"] != "assistant" for side in (chosen, rejected) if formats.is_messages(side)):
        found.append("answerer")
    if any(message["role"] not in _KNOWN_ROLES for value in messages for message in value):
        found.append("role")
    if explicit:
        if not formats.is_messages(row["prompt"]) and not row["prompt"]:
            found.append("no_prompt")
    elif not chosen or not rejected or chosen[0] != rejected[0]:
        if formats.is_messages(chosen):
            raise DataError(
                f"{place}: there is no prompt, and the two sides do not begin with the same message. Add a column "
                "prompt with the messages that both answer."
            )
        found.append("no_prompt")
    elif formats.is_messages(chosen):
        _check_answered(chosen, rejected, place)
    elif chosen != rejected and (chosen.startswith(rejected) or rejected.startswith(chosen)):
        found.append("prefix")
    return found


def without_answer(chosen: list, rejected: list) -> str | None:
    """Tell which of two conversations that begin with their prompt says nothing behind it; None where both do."""
    shorter = min(len(chosen), len(rejected))
    if chosen[:shorter] == rejected[:shorter] and (shorter == 1 or chosen[shorter - 1]["role"] in _ASKING):
        return "both" if len(chosen) == len(rejected) else "chosen" if len(chosen) < len(rejected) else "rejected"
    return None


def _check_answered(chosen: list, rejected: list, place: str) -> None:
    side = without_answer(chosen, rejected)
    if side is not None:
        has = "chosen and rejected have" if side == "both" else f"{side} has"
        raise DataError(f"{place}: {has} no answer, but the prompt alone. Add the answer, or leave the row out.")


def _check_same_kind(column: str, style: str, styles: dict, place: str) -> None:
    other, (known, _) = next(iter(styles.items()))
    if style == known:
        return
    fix = "write both as texts, or both as lists of messages."
    if (other, known) == ("prompt", "a text"):
        fix = (
            f"if {column} begins with the prompt, as in many such data sets, leave the text out:\n"
            '  dataset = dataset.remove_columns("prompt")'
        )
    raise DataError(f"{place}: {other} is {known}, but {column} is {style}; {fix}")


def _faults_of_tokens(row: Mapping, place: str) -> list[str]:
    for column in formats.TOKEN_COLUMNS:
        value = row[column]
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise DataError(f"{place}: {column} is {described(value)}; it must be a list of token ids.")
    found = []
    if not row["chosen_ids"] or not row["rejected_ids"]:
        found.append("empty")
    if row["chosen_ids"] == row["rejected_ids"]:
        found.append("identical")
    return found
