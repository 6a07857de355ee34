"""The kinds of rows that data sets come in: TRL's types, alpaca and sharegpt, told apart and converted."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from posttrain import former_names
from posttrain.data.messages import SYSTEM, is_messages, with_system
from posttrain.data.rendering.marks import switch_of
from posttrain.errors import DataError
from posttrain.visible import listed

PREFERENCE = "preference"
IMPLICIT_PROMPT = "preference with implicit prompt"
TOKENISED = "tokenised preference"
UNPAIRED = "unpaired preference"
PROMPT_COMPLETION = "prompt-completion"
PROMPT_ONLY = "prompt-only"
LANGUAGE_MODELLING = "language modelling"
ALPACA, ALPACA_PREFERENCE = "alpaca", "alpaca preference"
SHAREGPT, SHAREGPT_PREFERENCE = "sharegpt", "sharegpt preference"
UNKNOWN = "unknown"
# What `trl.DPOTrainer` trains on.
PAIR_KINDS = (PREFERENCE, IMPLICIT_PROMPT, TOKENISED)

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Every column that one of the kinds reads.
KNOWN_COLUMNS = (
    *("prompt", "chosen", "rejected", "completion", "label", "messages", "text", "conversations"),
    *("instruction", "input", "output", "system", "history", "tools", "chat_template_kwargs", "flip_rate"),
    *TOKEN_COLUMNS,
)

# Kinds that `convert` makes preference pairs of.
CONVERTED_PAIRS = (ALPACA_PREFERENCE, SHAREGPT_PREFERENCE)
# The columns that it reads for them, beside the sides.
CONVERTED_COLUMNS = ("instruction", "input", *SYSTEM, "history", "conversations", "messages", "prompt")
# What errors say of a row whose place is not known
NO_PLACE = "the row"

_OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "context"),
    "chosen": ("preferred", "winner", "accepted", "good", "better", "positive", "chosen_response", "response_chosen"),
    "rejected": ("loser", "dispreferred", "bad", "worse", "negative", "rejected_response", "response_rejected"),
}

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
_ROLES |= {name: name for name in ("user", "assistant", "system", "tool")}


@dataclass(frozen=True)
class Format:
    """What the rows of a data set are.

    Attributes:
        kind: one of this module's names, such as `preference` or `alpaca`.
        style: `conversational` (lists of messages), `standard` (texts), or empty where that is no question.
        why: the columns and values that say so, in words.
    """

    kind: str
    style: str
    why: str

    def __str__(self) -> str:
        return f"{self.style} {self.kind}".strip()


def detect(columns: Iterable[str], row: Mapping | None = None) -> Format:
    """Return the kind of a data set with these columns; `row`, any of its rows, tells texts from messages.

    Columns beside those of a kind change nothing. Where several kinds fit, the one with more columns is taken.
    """
    names, row = set(columns), row or {}
    if names.issuperset(TOKEN_COLUMNS):
        return Format(TOKENISED, "", "columns prompt_ids, chosen_ids and rejected_ids")
    if names >= {"chosen", "rejected"}:
        return _preference(names, row)
    for name in ("conversations", "messages"):
        if name in names and _has_keys(row.get(name), "from", "value"):
            return Format(SHAREGPT, "conversational", f"column {name}, of turns with from and value")
    if names >= {"instruction", "output"}:
        return Format(ALPACA, "standard", _columns(names, "instruction", "input", "output"))
    if names >= {"prompt", "completion", "label"}:
        return _trl(UNPAIRED, names, row, "prompt", "completion", "label")
    if names >= {"prompt", "completion"}:
        return _trl(PROMPT_COMPLETION, names, row, "prompt", "completion")
    for name in ("messages", "conversations", "text"):
        if name in names:
            return _trl(LANGUAGE_MODELLING, names, row, name)
    if "prompt" in names:
        return _trl(PROMPT_ONLY, names, row, "prompt")
    return Format(
        UNKNOWN,
        "",
        "the known columns are prompt with chosen and rejected, prompt with completion, messages, text, instruction "
        "with output, conversations",
    )


def renames(columns: Iterable[str]) -> dict[str, str]:
    """Tell which columns seem to be prompt, chosen or rejected under another name: that name to ours."""
    columns, names = list(columns), {}
    for needed, others in _OTHER_NAMES.items():
        other = next((other for other in others if other in columns), None)
        if other is not None and needed not in columns:
            names[other] = needed
    return names


def without_sides(columns: Iterable[str], name: str, row: Mapping | None = None, is_loaded: bool = False) -> DataError:
    """Return the error for rows that are no pairs: what was found, what is needed, what they are instead, and the fix.

    `name` says where the rows are. `is_loaded`: they are a `datasets.Dataset` at hand, which can be mended as one.
    """
    columns = list(columns)
    missing = [side for side in ("chosen", "rejected") if side not in columns]
    message = (
        f"{name} has no column {' and '.join(missing)}. Found: {listed(columns)}. Needed: chosen, "
        "rejected, and prompt unless both sides begin with it."
    )
    found, names = detect(columns, row), renames(columns)
    if set(missing) <= set(names.values()):
        if is_loaded:
            return DataError(f"{message} Rename yours:\n  names = {names}\n  dataset = dataset.rename_columns(names)")
        return DataError(f"{message} Rename {', '.join(f'{theirs} to {ours}' for theirs, ours in names.items())}.")
    if found.kind not in (UNKNOWN, TOKENISED):
        message += f" These look like {found} rows ({found.why}), without a second answer to compare with."
    message += (
        " A row looks like this, and columns of other names are renamed:\n"
        '  {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}'
    )
    return DataError(
        message + '\n  dataset = dataset.rename_columns({"better": "chosen", "worse": "rejected"})' * is_loaded
    )


def convert(dataset, places: Sequence[str] = ()):
    """Convert an alpaca or sharegpt data set (a `datasets.Dataset`) to TRL's conversational type; others as they are.

    alpaca: instruction, and input below it, become the user's message, after a system message and `history` where the
    row has them. sharegpt: `human` becomes user, `gpt` assistant, `observation` tool; messages with role and content
    stay. A column `system` or `system_prompt` stands in front, once. With columns chosen and rejected the result is
    preference pairs, else prompt-completion rows (alpaca) or messages (sharegpt). Columns that take no part are kept.

    `places`: where each row is, for errors; default: its number, from 1. Raises DataError for a speaker it does not
    know, for a second system message that is another one, and for sides that do not answer the instruction.
    """
    if len(dataset) == 0:
        return dataset
    found = detect(dataset.column_names, dataset[0])
    if found.kind not in (ALPACA, ALPACA_PREFERENCE, SHAREGPT, SHAREGPT_PREFERENCE):
        return dataset
    read = {"instruction", "input", "output", *SYSTEM, "history", "conversations", "messages"}

    def convert_one(row: dict, index: int) -> dict:
        return convert_row(row, found, places[index] if places else f"row {index + 1}")

    used = [name for name in dataset.column_names if name in read]
    return dataset.map(convert_one, with_indices=True, remove_columns=used, desc=f"Converting {found.kind}")


def convert_row(row: Mapping, found: Format, place: str = NO_PLACE) -> dict:
    """Return the columns that `convert` makes of one row of the kind `found`, which says where it is in errors."""
    if found.kind in (ALPACA, ALPACA_PREFERENCE):
        prompt = []
        for question, answer in row.get("history") or ():
            prompt += _message("user", question) + _message("assistant", answer)
        prompt += _message("user", "\n".join(filter(None, (row["instruction"], row.get("input")))))
        prompt = with_system(row, prompt, "prompt", place)
        if found.kind == ALPACA:
            return {"prompt": prompt, "completion": _message("assistant", row["output"])}
        return _behind_prompt(row, prompt, place)
    if found.kind in (SHAREGPT, SHAREGPT_PREFERENCE):
        turns = row["conversations"] if "conversations" in row else row.get("messages", row.get("prompt"))
        messages = (
            _message("user", turns) if isinstance(turns, str) else messages_of(turns or [], "conversations", place)
        )
        if found.kind == SHAREGPT:
            return {"messages": with_system(row, messages, "the conversation", place)}
        sides = {side: _answer(row[side], side, place) for side in ("chosen", "rejected")}
        if turns:
            return {"prompt": with_system(row, messages, "the conversation", place), **sides}
        return {side: with_system(row, messages, side, place) for side, messages in sides.items()}
    return dict(row)


def _preference(names: set, row: Mapping) -> Format:
    if any(_has_keys(row.get(name), "from", "value") for name in ("chosen", "rejected")):
        return Format(
            SHAREGPT_PREFERENCE, "conversational", "columns chosen and rejected, of turns with from and value"
        )
    if "prompt" in names:
        return _trl(PREFERENCE, names, row, "prompt", "chosen", "rejected", judge="chosen")
    if "instruction" in names:
        style = "conversational" if is_messages(row.get("chosen")) else "standard"
        return Format(ALPACA_PREFERENCE, style, _columns(names, "instruction", "input", "chosen", "rejected"))
    return _trl(IMPLICIT_PROMPT, names, row, "chosen", "rejected", judge="chosen")


def _trl(kind: str, names: set, row: Mapping, *columns: str, judge: str | None = None) -> Format:
    conversational = is_messages(row.get(judge or columns[0]))
    values = "lists of messages with role and content" if conversational else "texts"
    style = "conversational" if conversational else "standard"
    return Format(kind, style, f"{_columns(names, *columns)}, of {values}")


def _columns(names: set, *wanted: str) -> str:
    found = [name for name in wanted if name in names]
    if len(found) == 1:
        return f"column {found[0]}"
    return f"columns {', '.join(found[:-1])} and {found[-1]}"


def _has_keys(value, *keys: str) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and all(key in first for key in keys)


def _message(role: str, content) -> list[dict]:
    return [{"role": role, "content": content}]


def _behind_prompt(row: Mapping, prompt: list[dict], place: str) -> dict:
    """Return the prompt of an alpaca row and its two answers.

    Whole conversations that begin with the prompt are cut there.
    """
    sides = {side: _answer(row[side], side, place) for side in ("chosen", "rejected")}
    systems = ("system", "developer")
    if sides["chosen"][0]["role"] in systems and prompt[0]["role"] not in systems:
        prompt = [sides["chosen"][0], *prompt]
    for side, messages in sides.items():
        starts = (0, 1) if prompt[0]["role"] in systems else (0,)
        whole = next((prompt[start:] for start in starts if _begins_with(messages, prompt[start:])), None)
        if whole:
            sides[side] = messages[len(whole) :]
        elif messages[0]["role"] in ("user", "system", "developer"):
            raise DataError(
                f"{place}: {side} is a conversation that begins with other words than instruction and input, so it is "
                "not known which of them is the prompt. Leave out the column instruction, or cut the conversation off "
                "before its answer."
            )
    return {"prompt": prompt, **sides}


def _begins_with(messages: list[dict], prompt: list[dict]) -> bool:
    """Tell whether a conversation begins with the messages of a prompt, up to blanks around them, and goes on."""

    def said(turns: list[dict]) -> list:
        contents = [turn.get("content") for turn in turns]
        texts = [content.strip() if isinstance(content, str) else content for content in contents]
        return list(zip([turn["role"] for turn in turns], texts, strict=True))

    return len(messages) > len(prompt) and said(messages[: len(prompt)]) == said(prompt)


def _answer(value, side: str, place: str) -> list[dict]:
    if isinstance(value, str):
        return _message("assistant", value)
    if not value:
        raise DataError(
            f"{place}: {side} is {'null' if value is None else 'empty'}; it must be a text or messages. Mend the row, "
            "or leave it out."
        )
    return messages_of(value if isinstance(value, list) else [value], side, place)


def messages_of(turns: list, column: str, place: str) -> list[dict]:
    """Return the messages of turns with from and value, or role and content. Raises DataError with the place."""
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise DataError(
                f"{place}: {column} holds {str(turn)[:60]!r} of type {type(turn).__name__}, which is no turn. A turn "
                "has from and value, or role and content. Mend the row, or leave it out."
            )
        if turn.get("from") is None and isinstance(turn.get("role"), str):
            messages.append({name: value for name, value in turn.items() if name not in ("from", "value")})
            continue
        speaker = turn.get("from")
        if speaker not in _ROLES:
            raise DataError(
                f"{place}: the turn's speaker is {speaker!r}; sharegpt rows are read with {', '.join(_ROLES)}. "
                "Rename the speaker, or write the row as messages with role and content."
            )
        mark, made = switch_of(turn), _message(_ROLES[speaker], turn.get("value"))
        # a turn marked as not learned keeps its mark, for the check of the rows
        messages += [{**message, mark: turn[mark]} for message in made] if mark else made
    return messages


def __getattr__(name: str):
    if name in ("described", "is_empty", "message_problem", "style_of"):
        return former_names.held("posttrain.data.messages", name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
