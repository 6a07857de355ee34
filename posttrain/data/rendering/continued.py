"""Prompts that end with words of the assistant, which the answer goes on with: only the answer is learned.

TRL would begin another turn of the assistant behind them. The words are joined to the answers before it tokenises the
rows, and taken back to the prompt as tokens afterwards.
"""

import functools
from collections.abc import Mapping

from posttrain.data import objects
from posttrain.errors import DataError

# Holds the assistant's words that a row's prompt ended with, from `joined` to `parted`.
COLUMN = "continued_words"
_SIDES = ("chosen", "rejected", "completion")


def joined(dataset):
    """Return the data set with the words at the end of prompts moved to the beginning of the answers.

    Where no prompt ends with the assistant's words, and for streams, it is the data set itself.
    """
    dataset = _with_prompt(dataset)
    columns = set(getattr(dataset, "column_names", None) or ())
    sides = [name for name in _SIDES if name in columns]
    if "prompt" not in columns or not sides or COLUMN in columns or not hasattr(dataset, "__len__") or not len(dataset):
        return dataset
    if dataset.format["type"] == "custom" or not isinstance(dataset[0]["prompt"], list):
        return dataset
    if not any(
        words_of(prompt) for batch in dataset.select_columns(["prompt"]).iter(1000) for prompt in batch["prompt"]
    ):
        return dataset
    from datasets import Features, Json, List, Value

    kinds = {name: List(Json()) for name in ("prompt", *sides)} | {COLUMN: Value("string")}
    join = functools.partial(_join, sides=sides)
    return objects.quietly_mapped(dataset, join, features=Features({**dataset.features, **kinds}))


def parted(dataset, part):
    """Return the tokenised data set with the words back in its prompts.

    `part` is `part_pair` or `part_labels` with a model's.

    The columns of messages are as they were.
    """
    columns = getattr(dataset, "column_names", None) or ()
    if COLUMN not in columns:
        return dataset
    return objects.quietly_mapped(dataset, part, remove_columns=[COLUMN], features=_without(dataset.features))


def part_pair(row: Mapping, render) -> dict:
    """Return a tokenised pair whose prompt ends with the words.

    `render`: ids of messages, with options of the template.
    """
    row = dict(row)
    words = row.pop(COLUMN, None)
    if not words:
        return row
    start, prompt, sides = len(row["prompt_ids"]), _prompt(row, words), ("chosen_ids", "rejected_ids")
    wholes = [row["prompt_ids"] + row[side] for side in sides]
    begun = _begun(prompt, row, render)
    length = min(_shared(begun, whole) for whole in wholes)
    _check(length, start)
    row["prompt_ids"] = wholes[0][:length]
    row |= {side: whole[length:] for side, whole in zip(sides, wholes, strict=True)}
    return row | _as_given(row, prompt, words)


def part_labels(row: Mapping, render) -> dict:
    """Return a tokenised answer (input_ids, labels) of which the words are not learned."""
    row = dict(row)
    words = row.pop(COLUMN, None)
    if not words:
        return row
    prompt, ids, labels = _prompt(row, words), row["input_ids"], row["labels"]
    begun = _begun(prompt, row, render)
    # what max_length cut off at the start
    whole = render([*row["prompt"], *row["completion"]], row)
    cut = next((n for n in range(len(whole) - len(ids) + 1) if whole[n : n + len(ids)] == ids), 0)
    length = _shared(begun, whole)
    _check(length, _shared(render(row["prompt"], row, add_generation_prompt=True), whole))
    row["labels"] = [-100 if i + cut < length else label for i, label in enumerate(labels)]
    return row | _as_given(row, prompt, words)


def words_of(prompt) -> str | None:
    """Return the assistant's words that a prompt ends with; None where it ends with another's, or with a tool call."""
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant" or last.get("tool_calls"):
        return None
    content = last.get("content")
    return content if isinstance(content, str) and content else None


def _with_prompt(dataset):
    """Give pairs a column for the prompt where they have none, as TRL finds it, where a prompt ends with such words."""
    columns = set(getattr(dataset, "column_names", None) or ())
    if "prompt" in columns or not {"chosen", "rejected"} <= columns or not hasattr(dataset, "__len__"):
        return dataset
    if not len(dataset) or dataset.format["type"] == "custom" or not isinstance(dataset[0]["chosen"], list):
        return dataset
    batches = dataset.select_columns(["chosen", "rejected"]).iter(1000)
    pairs = (pair for batch in batches for pair in zip(batch["chosen"], batch["rejected"], strict=True))
    if not any(_share_words(*pair) for pair in pairs):
        return dataset
    from datasets import Features, Json, List

    kinds = {name: List(Json()) for name in ("prompt", "chosen", "rejected")}
    return objects.quietly_mapped(dataset, _extracted, features=Features({**dataset.features, **kinds}))


def _share_words(chosen: list, rejected: list) -> bool:
    """Tell whether two sides differ first behind a turn of the assistant's, with another of it."""
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    following = {side[same].get("role") for side in (chosen, rejected)} if same else set()
    return following == {"assistant"} and bool(words_of(chosen[:same]))


def _extracted(row: Mapping) -> dict:
    from trl import extract_prompt

    found = extract_prompt(row)
    return {name: objects.as_json(found[name]) for name in ("prompt", "chosen", "rejected")}


def _join(row: Mapping, sides: list[str]) -> dict:
    words = words_of(row["prompt"])
    made = {name: row[name] for name in ("prompt", *sides)}
    begin = [row[side][0] if row[side] else {} for side in sides]
    if words and all(turn.get("role") == "assistant" for turn in begin):
        if len(row["prompt"]) == 1:
            raise DataError(
                f"a prompt is nothing but words of the assistant ({words[:60]!r}), which no template can render "
                "before an answer. Give it the question that they answer, or leave the row out."
            )
        made["prompt"] = row["prompt"][:-1]
        for side, turn in zip(sides, begin, strict=True):
            made[side] = [{**turn, "content": words + (turn.get("content") or "")}, *row[side][1:]]
    else:
        words = None
    return {name: objects.as_json(value) for name, value in made.items()} | {COLUMN: words}


def _prompt(row: Mapping, words: str) -> list:
    return [*row["prompt"], {"role": "assistant", "content": words}]


def _begun(prompt: list, row: Mapping, render) -> list[int]:
    try:
        return render(prompt, row, continue_final_message=True)
    except DataError as error:
        raise DataError(
            f"{error} The prompt ends with words of the assistant, which the template cannot continue."
        ) from None


def _shared(ids: list[int], others: list[int]) -> int:
    from trl.data_utils import common_prefix_length

    return common_prefix_length(ids, others)


def _check(length: int, start: int) -> None:
    if length <= start:
        raise DataError(
            "a prompt ends with words of the assistant, and the chat template cannot continue them: it renders them in "
            "another way before an answer. Move the words into the answers, or leave those rows out."
        )


def _as_given(row: Mapping, prompt: list, words: str) -> dict:
    """Return the messages as they were before `joined`."""
    made = {"prompt": prompt}
    for side in _SIDES:
        if side in row:
            first = row[side][0]
            made[side] = [{**first, "content": first["content"].removeprefix(words)}, *row[side][1:]]
    return {name: objects.as_json(value) for name, value in made.items()}


def _without(features):
    from datasets import Features

    return features and Features({name: feature for name, feature in features.items() if name != COLUMN})
