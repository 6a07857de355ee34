"""Rows against their rendering: what the chat template drops, repeats or prints as Python does."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from posttrain.data import formats, objects
from posttrain.data.processing import tokenizer_of
from posttrain.data.rendering import continued
from posttrain.data.rendering.applied import ControlTokens, adds_end
from posttrain.data.rendering.looks import rows_to_render
from posttrain.data.rendering.probes import Probe
from posttrain.data.rendering.survey import Survey
from posttrain.data.row_options import check_settings, tools_of
from posttrain.data.tokens import as_rendered, render, tokenized_pairs
from posttrain.errors import DataError
from posttrain.log import get_logger

# What rows are told apart by, the first that fits, and those of them that are no answer to a prompt.
_KINDS = (("chosen", "rejected"), ("completion",), ("demonstration",), ("messages",), ("text",), ("prompt",))
_WHOLE = (("messages",), ("text",))


@dataclass
class Findings:
    """What the check says.

    Attributes:
        warnings, notes: a sentence each.
        rendered: rows that were rendered.
    """

    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rendered: int = 0


def check(
    dataset,
    processing_class,
    name: str,
    places: Sequence[str] = (),
    unit: str = "rows",
    settings: Mapping | None = None,
) -> Findings:
    """Compare the texts of rows with what is left of them as tokens.

    Every row is looked at for control tokens in its texts, and for a prompt that stands again in its answers. Some are
    rendered, 32 spread over the data set and those that look unlike the others (in roles, keys of messages, kinds of
    content, numbers of turns, tools, template settings): with their own texts and with markers in the place of each.
    Every text must be there once, in order, an answer's among the supervised tokens.

    Args:
        dataset: a `datasets.Dataset` of prompt with chosen and rejected, completion or demonstration, of prompts
            alone, of sides that begin with their prompt, or of messages or texts. Tokenised rows are passed over.
        processing_class: the tokenizer, or the processor.
        name: of the data set, for messages. places: where each row is. Default: its number, from 1.
        unit: what rows are called.
        settings: of the template, for all rows, beside each row's own.

    Raises DataError where the model would learn something else than the rows say.
    """
    found = Findings()
    columns = set(dataset.column_names)
    if "messages" not in columns and "conversations" in columns:
        dataset = dataset.rename_column("conversations", "messages")
    kind = next((kind for kind in _KINDS if set(kind) <= set(dataset.column_names)), None)
    if kind is None or columns.issuperset(formats.TOKEN_COLUMNS) or {"image", "images"} & columns or not len(dataset):
        return found
    # beside messages there can be what they were made of
    names = dict.fromkeys((*(() if kind in _WHOLE else ("prompt",)), *kind, "tools", "chat_template_kwargs"))
    names = [column for column in names if column in columns | {"messages"} & set(kind)]
    if "tools" in names:
        for number, value in enumerate(dataset.with_format(None)["tools"]):
            tools_of({"tools": value}, places[number] if places else f"{name}, row {number + 1}")
    check_settings(settings, name)
    if "chat_template_kwargs" in names:
        for number, value in enumerate(dataset.with_format(None)["chat_template_kwargs"]):
            check_settings(value, places[number] if places else f"{name}, row {number + 1}")
    dataset = as_rendered(dataset.select_columns(names).with_format(None), processing_class)
    tokenizer = tokenizer_of(processing_class)
    is_task = kind in (("demonstration",), ("prompt",))
    survey = Survey(name, len(dataset), unit, ControlTokens.of(tokenizer))
    for number, row in enumerate(_rows(dataset)):
        place = places[number] if places else f"{name}, row {number + 1}"
        if is_task and continued.words_of(row["prompt"]):
            raise DataError(
                f"{place}: the prompt ends with words of the assistant, and a rollout would begin another turn behind "
                "them. Give such prompts as texts, rendered with `tokenizer.apply_chat_template(prompt, "
                "tokenize=False, continue_final_message=True)`, or leave those rows out."
            )
        survey.look(number, row, place)
    survey.refuse()
    warnings, found.notes = survey.tokens.say(name, len(dataset), unit, survey.is_text, tokenizer)
    found.warnings = survey.warnings() + warnings
    if is_task and survey.is_text and adds_end(tokenizer):
        found.warnings.append(
            f"{name}: the tokenizer puts {tokenizer.eos_token!r} behind every text, the prompts among them, so "
            "rollouts begin behind an end. Set `tokenizer.add_eos_token = False`, or give the prompts as messages."
        )
    chosen = rows_to_render(survey.looks, len(dataset))
    found.rendered = len(chosen)
    rows = dataset.select(chosen)
    where = [places[number] if places else f"{name}, row {number + 1}" for number in chosen]
    faults = _Faults(name, len(chosen), unit)
    for row, place, tokens in zip(rows, where, _tokens(rows, processing_class, where, settings), strict=True):
        faults.note(Probe(row, processing_class, settings).faults(tokens), place)
    faults.refuse()
    found.warnings += faults.warnings()
    found.notes += faults.notes()
    return found


def report(
    dataset,
    processing_class,
    name: str,
    places: Sequence[str] = (),
    unit: str = "rows",
    settings: Mapping | None = None,
) -> None:
    """Check as `check` does, and say in the log what was found."""
    found = check(dataset, processing_class, name, places, unit, settings)
    for note in found.notes:
        get_logger().info("%s", note)
    for warning in found.warnings:
        get_logger().warning("%s", warning)


class _Faults:
    """What the rendered rows showed, each fault once with its first row."""

    def __init__(self, name: str, rows: int, unit: str):
        self.name, self.rows, self.unit = name, rows, unit
        self.counts: Counter = Counter()
        self.first: dict = {}

    def note(self, faults: Iterable, place: str) -> None:
        """Count the faults of a row."""
        for fault in {fault.key: fault for fault in faults}.values():
            self.counts[fault.key] += 1
            self.first.setdefault(fault.key, (fault, place))

    def refuse(self) -> None:
        """Raise DataError for the first fault from which the model would learn something else."""
        for fault, place in self.first.values():
            if fault.is_wrong:
                raise DataError(self._sentence(fault, place))

    def warnings(self) -> list[str]:
        """Return a sentence about each of the others, without the notes."""
        found = [(fault, place) for fault, place in self.first.values() if not fault.is_note]
        # a tokenizer that loses line breaks loses blanks, as a rule
        return [self._sentence(*one) for one in found if one[0].key != ("blanks",) or ("lines",) not in self.first]

    def notes(self) -> list[str]:
        """Return a sentence about each that is a template's design."""
        return [self._sentence(fault, place) for fault, place in self.first.values() if fault.is_note]

    def _sentence(self, fault, place: str) -> str:
        count = self.counts[fault.key]
        return (
            f"{self.name}: {fault.what}, in {count} of {self.rows} {self.unit} rendered (first: {place}: "
            f"{fault.shown}). {fault.remedy}"
        )


def _rows(dataset) -> Iterator[dict]:
    for batch in dataset.iter(1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _tokens(rows, processing_class, places: Sequence[str], settings: Mapping | None) -> Iterator[dict[str, str]]:
    """Tell what is learned of each row as text: of its prompt (`prompt`) and of each answer, as the tokens have it."""
    tokenizer, names = tokenizer_of(processing_class), set(rows.column_names)
    pairs = rows
    sides = ("chosen", "rejected")
    if not {"chosen", "rejected"} <= names:
        side = next((name for name in ("completion", "demonstration") if name in names), None)
        if side is None:
            yield from _without_answers(rows, processing_class, places, settings)
            return
        sides = (side,)
        made = [row | {"chosen": row[side], "rejected": row[side]} for row in rows]
        if settings:
            made = [
                row | {"chat_template_kwargs": {**settings, **(row.get("chat_template_kwargs") or {})}} for row in made
            ]
        pairs = objects.exact(made).remove_columns(side)
    for tokens in tokenized_pairs(pairs, processing_class, places):
        read = {"prompt": tokenizer.decode(tokens["prompt_ids"])}
        for side in sides:
            read[side] = tokenizer.decode(tokens["rejected_ids" if side == "rejected" else "chosen_ids"])
        yield read


def _without_answers(rows, processing_class, places: Sequence[str], settings: Mapping | None) -> Iterator[dict]:
    """Return rows of whole conversations or texts, and prompts, to which the model will say something."""
    tokenizer = tokenizer_of(processing_class)
    for row, place in zip(rows, places, strict=True):
        part = next(name for name in ("prompt", "messages", "text") if name in row)
        options = {"add_generation_prompt": True} if part == "prompt" and isinstance(row[part], list) else {}
        kwargs = {**(settings or {}), **(row.get("chat_template_kwargs") or {})}
        row = {**row, "chat_template_kwargs": kwargs}
        yield {part: tokenizer.decode(render(row[part], row, processing_class, place, **options))}
