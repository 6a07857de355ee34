"""Reading tasks with a demonstration and a gold answer: generated, of reasoning-gym, a local file or a hub data set."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from posttrain.data import formats, generators, objects, shapes, sources, turns
from posttrain.data.columns import SYSTEM, first_with_system, log_left_out_columns, log_system_messages, system_in_front
from posttrain.data.rows import columns_of
from posttrain.data.sources import read_rows
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger
from posttrain.rewards.golds import gold_text

COLUMNS = ("prompt", "demonstration", "gold")
# Beside COLUMNS, what generated data sets and users' own may have.
OTHER_COLUMNS = ("difficulty", "gym_task", "tools", "chat_template_kwargs")

# Which columns hold the three, by what published sets call them; the first that fits is taken. Where there is no column
# of its own for it, the gold answer comes from the demonstration.
_SHAPES = (
    {"prompt": "prompt", "demonstration": "demonstration", "gold": "gold"},
    {"prompt": "prompt", "demonstration": "demonstration"},
    {"prompt": "problem", "demonstration": "solution", "gold": "answer"},
    {"prompt": "problem", "demonstration": "solution"},
    {"prompt": "question", "demonstration": "solution", "gold": "answer"},
    {"prompt": "question", "demonstration": "solution"},
    {"prompt": "question", "demonstration": "answer"},
    {"prompt": "prompt", "gold": "gold"},
    {"prompt": "problem", "gold": "answer"},
)
# The calculator notes of GSM8K, a calculation and its number: <<48/2=24>>
_NOTES = re.compile(r"<<(?=[^<>=]*\d)[^<>=A-Za-z]+=[^<>=A-Za-z\n]*\d[^<>=A-Za-z\n]*>>")
# 1,234 in GSM8K's way of writing
_NUMBER = re.compile(r"-?\$?\d{1,3}(,\d{3})+(\.\d+)?")
_MARKED = re.compile(r"^####[^\n]*\d", re.MULTILINE)


def load_demonstrations(
    source: str,
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
    conversational: bool = True,
    keep_notes: bool = False,
    need_demonstrations: bool = True,
    convert: bool = True,
    **given,
):
    """Load tasks as a `datasets.Dataset` with the columns prompt, demonstration and gold.

    A column `system` is put in front of prompts that are messages. `tools` (as JSON text) and `chat_template_kwargs`
    are kept, and rendered with their row.

    Args:
        source: one of
            - `generated:arithmetic` or `generated:modular_sum`, with the arguments of their functions as options:
              `generated:arithmetic?n=256&seed=0&operands=2-4&operators=+-`;
            - `gym:NAME`, a reasoning-gym data set, with options of its config: `gym:chain_sum?n=256&max_terms=3`;
            - a local file: .json (a list of rows), .jsonl, .jsonl.gz or .parquet, whatever the `split`;
            - a hub data set's id.
            Of the first two, any split but `train` gives tasks that are disjoint from the training ones.
        limit: the first rows only.
        columns: which columns are prompt, demonstration and gold, where their names are not known. Known are
            prompt + demonstration (+ gold), problem or question + solution (+ answer) as in MATH, and question + answer
            as in GSM8K. Without a column for gold it is what follows `####` in the demonstration, or its last box.
        config: of a hub data set that has several, such as `main` of openai/gsm8k.
        conversational: make texts into a user message and an assistant message. Rows of messages stay so.
        keep_notes: keep GSM8K's calculator notes, `<<48/2=24>>`, which are removed from the answers in files of its
            shape (question, answer that ends in `#### N`), and said to be. Other texts keep all they have.
        need_demonstrations: False lets demonstrations be empty, or their column be missing where there is one for gold.
        convert: rows of the shapes in `posttrain.data.shapes`, which is said.
        given: `name` (as `config`), `data_dir`, `data_files` of `datasets.load_dataset`, for hub data sets.

    Raises DataError for what cannot be read, missing columns, an empty prompt or demonstration, and a row without a
    gold answer, each with its place; ConfigError for wrong options; EnvironmentIssue where the hub cannot be reached
    or reasoning-gym is missing.
    """
    from datasets.exceptions import DatasetGenerationError

    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise ConfigError(f"limit={limit!r} must be at least 1, or left out for all rows.")
    if generators.is_made(source):
        made = generators.make(source, split, generators.TASKS, conversational)
        return made if limit is None else made.select(range(min(limit, len(made))))
    given |= {} if config is None or Path(source).expanduser().exists() else {"name": config}
    rows, places = read_rows(source, split, limit, **given)
    named = {theirs: ours for ours, theirs in (columns or {}).items() if ours != "gold"}
    rows = turns.read_all(rows, places, source, named)
    if convert and columns is None:
        rows, places = shapes.read_all(rows, places, (shapes.TASKS,), source)
    found = columns_of(rows)
    shape = _shape(found, columns, source, need_demonstrations)
    taken = {ours: theirs for ours, theirs in shape.items() if ours in COLUMNS and ours != theirs}
    if taken and columns is None:
        get_logger().info("%s: %s", source, ", ".join(f"{theirs} is the {ours}" for ours, theirs in taken.items()))
    log_left_out_columns(found, shape.values(), source)
    rows = rows if keep_notes else _without_notes(rows, shape, source)
    made = [
        _row(row, place, shape, conversational, need_demonstrations) for row, place in zip(rows, places, strict=True)
    ]
    with_system = first_with_system(rows)
    if with_system is not None:
        log_system_messages({**with_system, "prompt": made[0]["prompt"]}, source)
    try:
        return objects.exact(made, places=places)
    except (TypeError, ValueError, OverflowError, DatasetGenerationError) as error:
        # pyarrow's own errors are ValueErrors or TypeErrors
        raise DataError(f"{source}: the rows do not have the same types throughout: {error}") from None


def as_tasks(rows: list[dict], places: list[str], name: str, conversational: bool = True):
    """Make rows of tasks as `load_demonstrations` makes them, and the columns' names there: ours to theirs.

    None where the columns are those of no task. Raises DataError for a row that has no prompt or no gold answer.
    """
    try:
        shape = _shape(columns_of(rows), None, name, False)
    except DataError:
        return None
    rows = _without_notes(rows, shape, name)
    made = [_row(row, place, shape, conversational, False) for row, place in zip(rows, places, strict=True)]
    return made, {ours: theirs for ours, theirs in shape.items() if ours in COLUMNS}


def _shape(found: list[str], columns: Mapping[str, str] | None, source: str, need: bool) -> dict[str, str]:
    """Return the source's column for each of ours, ours that are not there left out."""
    if columns is not None:
        unknown = sorted(set(columns) - set(COLUMNS))
        if unknown:
            raise ConfigError(f"columns={dict(columns)!r}: {unknown[0]!r} is not one of {', '.join(COLUMNS)}.")
        missing = sorted(set(columns.values()) - set(found))
        if missing:
            raise DataError(f"{source}: column {missing[0]!r} of columns={dict(columns)!r} is missing; found {found}.")
    shapes = _SHAPES if columns is None else (dict(columns),)
    for shape in shapes:
        answer = "demonstration" in shape or ("gold" in shape and not need)
        if "prompt" in shape and answer and set(shape.values()) <= set(found):
            return {**shape, **{name: name for name in OTHER_COLUMNS if name in found}}
    if columns is not None:
        least = "demonstration" if need else "demonstration or gold"
        raise ConfigError(f"columns={dict(columns)!r} must name the columns of at least prompt and {least}.")
    missing = "demonstration" if need else "gold"
    raise DataError(
        f"{source}: no columns for prompt and {missing}; found {found}. Known are prompt + demonstration (+ gold), "
        "problem + solution (+ answer) and question + answer (ending in '#### N'). Name others by "
        "prompt_column, demonstration_column and gold_column in a recipe, by "
        "columns={'prompt': ..., 'demonstration': ..., 'gold': ...} in Python."
    )


def _row(row: dict, place: str, shape: dict[str, str], conversational: bool, need: bool) -> dict:
    prompt = _side(row, place, shape["prompt"], "prompt")
    demonstration = row.get(shape.get("demonstration"))
    if need or (demonstration and not _is_blank(demonstration)):
        demonstration = _side(row, place, shape["demonstration"], "demonstration")
    else:
        demonstration = "" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}]
    if not isinstance(demonstration, str):
        # what calls a tool need not say anything
        demonstration = [{**message, "content": message["content"] or ""} for message in demonstration]
    made = {name: row.get(column) for name, column in shape.items() if name in OTHER_COLUMNS}
    if made.get("tools") is not None and not isinstance(made["tools"], str):
        # as text, rows' tools keep their own arguments
        made["tools"] = json.dumps(made["tools"])
    if "gold" in shape:
        gold = gold_text(row.get(shape["gold"]), shape["gold"], place)
    else:
        gold = _marked_gold(demonstration, place, shape["demonstration"])
    if conversational and isinstance(prompt, str) and isinstance(demonstration, str):
        prompt = [{"role": "user", "content": prompt}]
        demonstration = [{"role": "assistant", "content": demonstration}]
    if formats.is_messages(prompt):
        system = {name: row[name] for name in SYSTEM if name in row}
        prompt = system_in_front(system | {"prompt": prompt}, place).get("prompt", prompt)
    if isinstance(prompt, str) != isinstance(demonstration, str):
        raise DataError(f"{place}: prompt and demonstration must both be texts or both lists of messages.")
    shown = {"demonstration": demonstration} if "demonstration" in shape else {}
    return {"prompt": prompt, **shown, "gold": gold, **made}


def _side(row: dict, place: str, column: str, name: str):
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        return value
    value = objects.flattened(value)
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return value
    shown = "an empty text" if isinstance(value, str) else "an empty list" if value == [] else sources.kind_of(value)
    raise DataError(f"{place}: {column!r}, the {name}, is {shown}; it must be a text or a list of messages.")


def _is_blank(value) -> bool:
    return isinstance(value, str) and not value.strip()


def _is_message(message) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    # what calls a tool need not say anything
    return isinstance(message.get("content"), str) or (
        message.get("content") is None and bool(message.get("tool_calls"))
    )


def _without_notes(rows: list[dict], shape: dict[str, str], source: str) -> list[dict]:
    """Return rows of GSM8K's shape without calculator notes in their answers, which is said; others as they are."""
    if (shape["prompt"], shape.get("demonstration"), "gold" in shape) != ("question", "answer", False):
        return rows
    made, removed = [], 0
    for row in rows:
        answer = row.get("answer")
        if isinstance(answer, str) and _MARKED.search(answer):
            answer, count = _NOTES.subn("", answer)
            removed += count
            row = {**row, "answer": answer} if count else row
        made.append(row)
    if removed:
        get_logger().info(
            "%s: %d calculator notes (<<48/2=24>>) are removed from the answers; keep_notes=True in Python keeps them",
            source, removed,
        )  # fmt: skip
    return made


def _marked_gold(demonstration, place: str, column: str) -> str:
    from posttrain.rewards.answers import final_answer

    text = demonstration if isinstance(demonstration, str) else demonstration[-1]["content"] or ""
    for where in ("hash", "boxed"):
        answer = final_answer(text, where)
        if answer is not None and answer.text:
            return answer.text.replace(",", "") if _NUMBER.fullmatch(answer.text) else answer.text
    raise DataError(
        f"{place}: {column!r} ends without '#### N' (or a box) and there is no column for the gold answer; it ends in "
        f"{text[-60:]!r}. Mark the answer, or name its column: gold_column in a recipe, columns={{'gold': ...}} in "
        "Python."
    )
