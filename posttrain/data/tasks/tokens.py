"""The tokens of demonstrations: what of them is learned, and how they end."""

from datasets import Dataset

from posttrain.checks import shorten
from posttrain.data.rendering.ends import Closing
from posttrain.data.rendering.refusals import refusal
from posttrain.data.row_options import template_kwargs_of, tools_of
from posttrain.errors import DataError
from posttrain.log import get_logger
from posttrain.visible import listed

COLUMN, IDS = "demonstration", "demonstration_ids"
_READ = ("prompt", COLUMN, "tools", "chat_template_kwargs")


def tokenise(dataset, tokenizer, args, name: str, stop_ids=()):
    """Add `demonstration_ids`: what the model is to say after the prompt, up to the token at which generation stops.

    `stop_ids`: at which the model's generation stops; without any, the chat template's own end of turn decides. Columns
    `tools` and `chat_template_kwargs` are the row's own.

    Raises:
        DataError: no `datasets.Dataset`, or one without `demonstration` column; a demonstration that is neither a text
            nor one message of the assistant; an empty or over-long one where the config says error; a chat template
            under which the prompt with its answer does not begin with the prompt, or, with `end_of_turn: require`,
            one that closes no turn.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"{name} is of type {type(dataset).__name__}; with a gate its demonstrations are read before training, "
            "from a datasets.Dataset. Load it whole (Dataset.from_list(rows)), or set `gamma: null`."
        )
    columns = dataset.column_names or []
    missing = [column for column in ("prompt", COLUMN) if column not in columns]
    if missing:
        raise DataError(
            f"{name} has no column {missing[0]!r}, which the gate for demonstrations needs. Found: "
            f"{listed(columns)}. Rename or add it, or set `gamma: null`."
        )
    closing = Closing(tokenizer, stop_ids)
    found = []
    for number, row in enumerate(dataset.select_columns([c for c in _READ if c in columns]), 1):
        kwargs = (args.chat_template_kwargs or {}) | template_kwargs_of(row)
        try:
            found.append(_ids(row["prompt"], row[COLUMN], tokenizer, kwargs, tools_of(row), closing))
        except DataError as error:
            raise DataError(f"{name}, row {number}: {error}") from None
    _check_closing(closing, args, name, len(found))
    rows = dataset.remove_columns([IDS] if IDS in columns else []).add_column(IDS, found)
    lengths = [len(ids) for ids in rows[IDS]]
    empty = [number for number, length in enumerate(lengths, 1) if not length]
    if empty and args.empty_demonstrations == "error":
        raise DataError(
            f"{len(empty)} of {len(lengths)} demonstrations of {name} are empty, the first in row {empty[0]}. Fill or "
            "drop them, or set `empty_demonstrations: rollouts`, which leaves such prompts to their rollouts."
        )
    if empty:
        get_logger().warning(
            "%d of %d demonstrations of %s are empty; these prompts keep their rollouts", len(empty), len(rows), name
        )
    limit = args.max_completion_length
    long = [number for number, length in enumerate(lengths, 1) if length > limit]
    if long and args.long_demonstrations == "error":
        raise DataError(
            f"{len(long)} of {len(lengths)} demonstrations of {name} are longer than max_completion_length ({limit} "
            f"tokens), the first in row {long[0]} ({lengths[long[0] - 1]} tokens). Set max_completion_length to "
            f"{max(lengths)}, or `long_demonstrations: truncate`, which cuts them before their end."
        )
    if long:
        get_logger().warning(
            "%d of %d demonstrations of %s are cut to %d tokens, without their end", len(long), len(rows), name, limit
        )
        rows = rows.map(lambda row: {IDS: row[IDS][:limit]}, desc=f"Cutting demonstrations of {name}")
    return rows


def _check_closing(closing: Closing, args, name: str, rows: int) -> None:
    """Say, or with `end_of_turn: require` refuse, that the template ends no turn where generation stops."""
    eos = closing.tokenizer.eos_token
    if closing.unclosed:
        fault = (
            f"{name}: the chat template closes no turn, so {closing.unclosed} of {rows} demonstrations end with the "
            f"tokenizer's {eos!r}"
        )
        if args.end_of_turn == "require" and closing.unclosed > rows / 2:
            raise DataError(
                f"{fault}, and end_of_turn is require. Use the template of the model's instruct version, or set "
                "`end_of_turn: warn`."
            )
        get_logger().warning("%s", fault)
    if closing.unstopped:
        get_logger().warning(
            "%s: generation does not stop at the demonstrations' end of turn, so %d of %d demonstrations get %r behind "
            "it. Put it into `model.generation_config.eos_token_id`.", name, closing.unstopped, rows, eos,
        )  # fmt: skip


def _ids(prompt, demonstration, tokenizer, template_kwargs: dict, tools=None, closing: Closing | None = None):
    answer, calls = _answer(demonstration), _calls(demonstration)
    if not answer.strip() and not calls:
        return []
    closing = closing or Closing(tokenizer)
    if isinstance(prompt, str):
        if not isinstance(demonstration, str):
            raise DataError("a prompt is text and its demonstration is not; give both as text, or both as messages.")
        return closing.text(tokenizer(demonstration, add_special_tokens=False)["input_ids"])
    turns = [{"role": "assistant", "content": answer}] if isinstance(demonstration, str) else demonstration
    kwargs = {"tools": tools, "tokenize": True, "return_dict": True, **template_kwargs}
    try:
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **kwargs)["input_ids"]
        whole = tokenizer.apply_chat_template([*prompt, *turns], **kwargs)["input_ids"]
    # a chat template is a program that came with the model: anything can come out of it
    except Exception as error:
        said = refusal(error, [[*prompt, *turns]], lambda messages: tokenizer.apply_chat_template(messages, **kwargs))
        raise DataError(said) from error
    if whole[: len(before)] != before:
        raise DataError(
            "the chat template changes the prompt once an answer follows it, so the answer's tokens cannot be told "
            "apart. Give prompt and demonstration as text with the template applied."
        )
    return closing.messages(whole[len(before) :], prompt, tools, template_kwargs, turns[0] if calls else None)


def _calls(demonstration) -> list | None:
    """Return the tool calls of a demonstration; None where it makes none."""
    turn = demonstration[-1] if isinstance(demonstration, list) and demonstration else None
    return (turn.get("tool_calls") or None) if isinstance(turn, dict) else None


def _answer(demonstration) -> str:
    """Return the text of a demonstration, empty where there is none."""
    if not demonstration:
        return ""
    if isinstance(demonstration, str):
        return demonstration
    turns = demonstration if isinstance(demonstration, list) else []
    if len(turns) == 1 and isinstance(turns[0], dict) and turns[0].get("role") == "assistant":
        content = turns[0].get("content")
        if content is None or isinstance(content, str):
            return content or ""
    raise DataError(
        f"the demonstration is {shorten(demonstration)}; it must be a text, or a list of one message of the assistant "
        "whose content is a text (no images, no turns of others)."
    )
