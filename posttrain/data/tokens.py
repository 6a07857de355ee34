"""The tokens that training will see, and which of them it learns."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import NamedTuple

from posttrain import former_names
from posttrain.data import formats, objects
from posttrain.data.messages import style_of
from posttrain.data.pairs import faults
from posttrain.data.processing import tokenizer_of
from posttrain.data.rendering import applied, bounds, closers, continued
from posttrain.data.rendering.refusals import refusal
from posttrain.data.row_options import check_settings, tools_of, with_read_tools
from posttrain.errors import ConfigError, DataError

bounds.install()
_READ_BY_TRL = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


class TokenSequence(NamedTuple):
    """The token ids of one part of a row (`chosen`, `messages`, ...) and, for each, whether it is supervised."""

    part: str
    ids: list[int]
    supervised: list[bool]


def as_rendered(dataset, processing_class, learned: bool = True, name: str = ""):
    """Return a data set as the chat template and the tokenizer are to see it, in training and in every check.

    Nested values are as the rows had them, blocks of text are text (`objects.restored`), and texts with the template
    already applied begin and end once (`applied.without_doubles`). Words of the assistant at the end of a prompt are
    joined to the answer (`continued.joined`); `as_learned` parts their tokens.

    `learned`: the rows' own answers are; False for prompts to roll out from, which get no column of ours. `name`: what
    the data set is called in errors.
    """
    if not hasattr(dataset, "column_names"):
        # what is no data set is refused where it is used
        return dataset
    dataset = with_read_tools(objects.restored(dataset), name)
    dataset = applied.without_doubles(dataset, tokenizer_of(processing_class), learned)
    return continued.joined(dataset)


def as_learned(dataset, processing_class, place: str):
    """Return a data set that TRL tokenised of what `as_rendered` made: prompts end where the row's do, and turns end
    once.

    `place`: what the data set is called in errors.
    """
    part = continued.part_labels if "labels" in objects.names_of(dataset) else continued.part_pair
    dataset = continued.parted(dataset, functools.partial(part, render=_renderer(processing_class, place)))
    return closers.parted(dataset, tokenizer_of(processing_class).eos_token_id)


def tokenized_pairs(dataset, processing_class, places: Sequence[str] = ()) -> Iterator[dict]:
    """Return the columns prompt_ids, chosen_ids and rejected_ids of each row, as `trl.DPOTrainer` makes them.

    Nothing is cut, dropped, cached, shown or written. `dataset`: a `datasets.Dataset` of preference rows, or of rows
    that are tokenised already. `places`: where each row is, for errors; default: its number, from 1. Raises DataError
    for a row that cannot be rendered, ConfigError for a tokenizer that lacks what the rows need.
    """
    if set(dataset.column_names).issuperset(formats.TOKEN_COLUMNS):
        yield from dataset.select_columns(list(formats.TOKEN_COLUMNS))
        return
    from trl import DPOTrainer

    tokenizer = tokenizer_of(processing_class)
    if formats.is_messages(dataset[0]["chosen"]):
        if not processing_class.chat_template:
            raise ConfigError(
                "the rows are conversational, and the tokenizer has no chat template to render them with. Use an "
                "instruct model, set `tokenizer.chat_template`, or give prompt, chosen and rejected as texts."
            )
    elif tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no eos_token to end an answer with; set `tokenizer.eos_token`.")
    names = [name for name in _READ_BY_TRL if name in dataset.column_names]
    dataset = as_rendered(dataset.select_columns(names).with_format(None), processing_class)
    # In this form nothing is hashed, cached or shown; the method reads no more of the trainer than its tokenizer.
    stream = dataset.to_iterable_dataset()
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    done = 0
    try:
        prepared = DPOTrainer._prepare_dataset(
            SimpleNamespace(_tokenizer=tokenizer), stream, processing_class, arguments, "check"
        )
        for row in prepared:
            if continued.COLUMN in row:
                row = continued.part_pair(
                    row, _renderer(processing_class, places[done] if places else f"row {done + 1}")
                )
            if closers.COLUMN in row:
                row = closers.without_appended(row, tokenizer.eos_token_id)
            yield {name: row[name] for name in formats.TOKEN_COLUMNS}
            done += 1
    except DataError:
        raise
    # a chat template is a program that came with the model: anything can come out of it
    except Exception as error:
        place = places[done] if places else f"row {done + 1}"
        row = dataset[done] if done < len(dataset) else {}
        wholes = [_whole(row, side) for side in ("chosen", "rejected")]
        said = refusal(error, wholes, lambda messages: render_text(messages, row, processing_class))
        raise DataError(f"{place}: {said}") from error


def _whole(row: Mapping, side: str) -> list | None:
    """Return the messages of a row with one of its sides; None for texts."""
    prompt, answer = row.get("prompt") or [], row.get(side)
    return [*prompt, *answer] if isinstance(prompt, list) and isinstance(answer, list) else None


def sequences(row: Mapping, found: formats.Format, processing_class, place: str = "the row") -> list[TokenSequence]:
    """Tell what training would see of one row of the kind `found`; `place` says where it is, for errors.

    Preference rows give the sequences chosen and rejected; the tokens after the prompt are supervised. Of messages,
    the assistant's tokens are (as with TRL's `assistant_only_loss`) where the template marks them, or TRL has a form
    of it that does; else all. alpaca and sharegpt rows are converted first. Raises DataError for a row that cannot be
    rendered.
    """
    if found.kind in (formats.ALPACA, formats.ALPACA_PREFERENCE, formats.SHAREGPT, formats.SHAREGPT_PREFERENCE):
        row = formats.convert_row(row, found, place)
        found = formats.detect(row, row)
    row = {name: objects.flattened(value) for name, value in row.items()}
    check_settings(row.get("chat_template_kwargs"), place)
    if "tools" in row:
        row["tools"] = tools_of(row, place)
    if found.kind in formats.PAIR_KINDS:
        faults.faults(row, place)
    else:
        for column in ("prompt", "completion", "messages", "conversations", "text"):
            if column in row:
                style_of(row[column], column, place)
    if found.kind == formats.LANGUAGE_MODELLING:
        return [_language_modelling(row, processing_class, place)]
    if found.kind == formats.PROMPT_ONLY:
        row = applied.clean_row(row, tokenizer_of(processing_class))
        ids = render(row["prompt"], row, processing_class, place, add_generation_prompt=True)
        return [TokenSequence("prompt", ids, [False] * len(ids))]
    sides = ("chosen", "rejected")
    if found.kind in (formats.PROMPT_COMPLETION, formats.UNPAIRED):
        sides = ("completion",)
        row = {**row, "chosen": row["completion"], "rejected": row["completion"]}
    names = [name for name in (*_READ_BY_TRL, *formats.TOKEN_COLUMNS) if row.get(name) is not None]
    pair = objects.exact([{name: row[name] for name in names}], places=[place])
    tokens = next(tokenized_pairs(pair, processing_class, [place]))
    prompt = tokens["prompt_ids"]
    parts = []
    for side in sides:
        answer = tokens["rejected_ids" if side == "rejected" else "chosen_ids"]
        parts.append(TokenSequence(side, prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return parts


def render(value, row: Mapping, processing_class, place: str, **options) -> list[int]:
    """Return the token ids of a text, or of messages through the chat template with the row's tools and template
    settings.

    `options` go to the template. Raises DataError for what the template or the tokenizer refuses.
    """
    return _render(value, row, processing_class, place, **options)["input_ids"]


def _renderer(processing_class, place: str):
    return functools.partial(_ids_of, processing_class=processing_class, place=place)


def _ids_of(messages: list, row: Mapping, processing_class, place: str, **options) -> list[int]:
    return render(messages, row, processing_class, place, **options)


def render_text(messages: list, row: Mapping, processing_class, **options) -> str:
    """Render messages through the chat template, as a text. Raises whatever the template raises."""
    from transformers import ProcessorMixin
    from trl.data_utils import prepare_multimodal_messages

    if isinstance(processing_class, ProcessorMixin):
        messages = prepare_multimodal_messages(messages)
    options |= _template_options(row)
    return processing_class.apply_chat_template(messages, tokenize=False, **options)


def _language_modelling(row: Mapping, processing_class, place: str) -> TokenSequence:
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if isinstance(row.get("text"), str):
        tokenizer = tokenizer_of(processing_class)
        eos = tokenizer.eos_token or ""
        cleaned = applied.clean_row({"text": row["text"]}, tokenizer)
        text = cleaned["text"]
        text = text if text.endswith(eos) or cleaned[closers.COLUMN] else text + eos
        ids = render(text, row, processing_class, place)
        if ids[-2:] == [tokenizer.eos_token_id] * 2:
            # the tokenizer's own, behind the one of the text
            ids = ids[:-1]
        return TokenSequence("text", ids, [True] * len(ids))
    messages = row["messages"] if "messages" in row else row["conversations"]
    template = processing_class.chat_template
    # TRL knows many templates by heart and has a form of each with the marks
    with contextlib.suppress(ValueError):
        template = get_training_chat_template(processing_class) or template
    if not template or not has_generation_markers(template):
        ids = render(messages, row, processing_class, place)
        return TokenSequence("messages", ids, [True] * len(ids))
    marks = {"chat_template": template, "return_assistant_tokens_mask": True}
    rendered = _render(messages, row, processing_class, place, **marks)
    return TokenSequence("messages", rendered["input_ids"], [bool(mark) for mark in rendered["assistant_masks"]])


def _render(value, row: Mapping, processing_class, place: str, **options) -> dict:
    try:
        if isinstance(value, str):
            return processing_class(text=value)
        options |= _template_options(row)
        return processing_class.apply_chat_template(value, tokenize=True, return_dict=True, **options)
    except DataError:
        raise
    except Exception as error:
        conversations = [] if isinstance(value, str) else [value]
        said = refusal(error, conversations, lambda messages: render_text(messages, row, processing_class))
        raise DataError(f"{place}: {said}") from error


def _template_options(row: Mapping) -> dict:
    return {"tools": tools_of(row), **(row.get("chat_template_kwargs") or {})}


def __getattr__(name: str):
    if name in ("generation_stop_ids", "load_processing_class", "processing_class_for", "template_facts"):
        return former_names.held("posttrain.data.processing", name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
