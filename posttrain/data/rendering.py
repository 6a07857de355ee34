"""Rows against their rendering: what the chat template drops, repeats or prints as Python's own, before a model loads."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from posttrain.data import objects
from posttrain.data.applied import ControlTokens
from posttrain.data.probes import Probe, answers_of, prompt_of
from posttrain.data.tokens import as_rendered, render, tokenized_pairs, tokenizer_of
from posttrain.errors import DataError

# Rows that are rendered: so many, spread over the data set, and of those that look unlike the others up to so many.
SPREAD, UNLIKE = 32, 256
# Rows look unlike the others where no more than this share of them, or so few, look like that.
_FEW_SHARE, _FEW = 0.01, 8
# Characters that prompts must have together before answers that begin with them are no chance.
_CHANCE = 16
_COLUMNS = ("prompt", "chosen", "rejected", "completion", "demonstration", "messages", "text")
_SETTINGS = ("tools", "chat_template_kwargs")


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
    names = [column for column in (*_COLUMNS, *_SETTINGS) if column in dataset.column_names]
    pairs = {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(dataset.column_names)
    if pairs or not names or {"image", "images"} & set(dataset.column_names):
        return found
    dataset = as_rendered(dataset.select_columns(names).with_format(None), processing_class)
    tokenizer = tokenizer_of(processing_class)
    survey = _Survey(name, len(dataset), unit, ControlTokens.of(tokenizer))
    for number, row in enumerate(_rows(dataset)):
        survey.look(number, row, places[number] if places else f"{name}, row {number + 1}")
    survey.refuse()
    warnings, found.notes = survey.tokens.say(name, len(dataset), unit, survey.is_text, tokenizer)
    found.warnings = survey.warnings() + warnings
    chosen = survey.to_render()
    found.rendered = len(chosen)
    rows = dataset.select(chosen)
    where = [places[number] if places else f"{name}, row {number + 1}" for number in chosen]
    faults = _Faults(name, len(chosen), unit)
    for row, place, tokens in zip(rows, where, _tokens(rows, processing_class, where, settings), strict=True):
        faults.note(Probe(row, processing_class, settings).faults(tokens), place)
    faults.refuse()
    found.warnings += faults.warnings()
    return found


class _Survey:
    """One pass over all rows: what they look like, and the faults that need no template."""

    def __init__(self, name: str, rows: int, unit: str, tokens: ControlTokens):
        self.name, self.rows, self.unit, self.tokens = name, rows, unit, tokens
        self.looks: dict[tuple, list[int]] = {}
        self.is_text = False
        self.repeated, self.repeated_characters = 0, 0
        # of those, with prompts too long for chance
        self.plainly_repeated, self.first_repeated = 0, ""
        self.others: Counter = Counter()
        self.first_other: dict[str, str] = {}

    def look(self, number: int, row: Mapping, place: str) -> None:
        """Take in a row."""
        self.looks.setdefault(_look(row), []).append(number)
        prompt, answers = prompt_of(row), answers_of(row)
        parts = {"prompt": prompt, **answers}
        self.is_text = any(isinstance(value, str) for value in parts.values())
        self.tokens.look({part: list(_texts(value)) for part, value in parts.items()}, place, self.is_text)
        if not prompt or not answers:
            return
        if all(_begins_with(answer, prompt) for answer in answers.values()):
            length = len("".join(prompt.split())) if isinstance(prompt, str) else _CHANCE
            self.repeated += 1
            self.repeated_characters += length
            if length >= _CHANCE // 2:
                self.plainly_repeated += 1
                self.first_repeated = self.first_repeated or place
            return
        for answer in answers.values():
            for role in (
                {turn.get("role") for turn in answer} & {"user", "system", "developer", "tool"}
                if isinstance(answer, list)
                else ()
            ):
                self.others[role] += 1
                self.first_other.setdefault(role, place)

    def refuse(self) -> None:
        """Raise DataError for a prompt that stands in the answers too, and for others' turns within an answer."""
        if self._are_repeated:
            first = f" (first: {self.first_repeated})" if self.first_repeated else ""
            raise DataError(
                f"{self.name}: in {self.repeated} of {self.rows} {self.unit} the answers begin with the prompt, which "
                f"stands in its own column as well{first}: it would be there twice, and learned "
                "as part of the answers. Cut it off the answers, or of pairs leave the column out:\n"
                '  dataset = dataset.remove_columns("prompt")'
            )
        for role in ("user", "system", "developer"):
            if self.others[role]:
                raise DataError(
                    f"{self.name}: in {self.others[role]} answers the {role} takes a turn (first: "
                    f"{self.first_other[role]}), which would be learned as the assistant's words. Move the turns up "
                    "to the last answer into the prompt, or cut the answer after its first turn."
                )

    def warnings(self) -> list[str]:
        """A sentence about each fault that is only said."""
        said = []
        if self.plainly_repeated and not self._are_repeated:
            said.append(
                f"{self.name}: in {self.plainly_repeated} of {self.rows} {self.unit} the answers begin with the prompt, which "
                f"they repeat (first: {self.first_repeated}). Where that is no part of the answer, cut it off."
            )
        if self.others["tool"]:
            said.append(
                f"{self.name}: in {self.others['tool']} answers a tool takes a turn (first: "
                f"{self.first_other['tool']}); its results are learned as the assistant's words. Move the turns up to "
                "the last answer into the prompt."
            )
        return said

    @property
    def _are_repeated(self) -> bool:
        if not self.is_text:
            return self.repeated > 0
        if self.repeated == self.rows and self.repeated_characters >= _CHANCE:
            return True
        return 2 * self.plainly_repeated >= self.rows and self.repeated_characters >= _CHANCE

    def to_render(self) -> list[int]:
        """The rows to render, in order."""
        spread = {i * self.rows // SPREAD for i in range(SPREAD)} if self.rows > SPREAD else set(range(self.rows))
        few = max(_FEW, int(_FEW_SHARE * self.rows))
        looks = sorted(self.looks.values(), key=len)
        unlike = [number for numbers in looks if len(numbers) <= few for number in numbers][:UNLIKE]
        # of rows that look alike, the first
        return sorted({*spread, *unlike, *(numbers[0] for numbers in looks[:UNLIKE])})


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
        """A sentence about each of the others."""
        return [self._sentence(fault, place) for fault, place in self.first.values()]

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
    """What is learned of each row as text: of its prompt (`prompt`) and of each answer, as the tokens have it."""
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
        pairs = objects.exact(made).remove_columns(side)
    for tokens in tokenized_pairs(pairs, processing_class, places):
        read = {"prompt": tokenizer.decode(tokens["prompt_ids"])}
        for side in sides:
            read[side] = tokenizer.decode(tokens["rejected_ids" if side == "rejected" else "chosen_ids"])
        yield read


def _without_answers(rows, processing_class, places: Sequence[str], settings: Mapping | None) -> Iterator[dict]:
    """Rows of whole conversations or texts, and prompts, to which the model will say something."""
    tokenizer = tokenizer_of(processing_class)
    for row, place in zip(rows, places, strict=True):
        part = next(name for name in ("prompt", "messages", "text") if name in row)
        options = {"add_generation_prompt": True} if part == "prompt" and isinstance(row[part], list) else {}
        kwargs = {**(settings or {}), **(row.get("chat_template_kwargs") or {})}
        row = {**row, "chat_template_kwargs": kwargs}
        yield {part: tokenizer.decode(render(row[part], row, processing_class, place, **options))}


def _look(row: Mapping) -> tuple:
    """What a row looks like, beside its texts."""
    found = []
    for name, value in row.items():
        if name == "tools":
            found.append((name, bool(value)))
        elif name == "chat_template_kwargs":
            found.append((name, tuple(sorted(value or ()))))
        elif isinstance(value, list):
            found.append((name, tuple(_look_of_turn(turn) for turn in value)))
        else:
            found.append((name, "empty" if not value else "text"))
    return tuple(found)


def _look_of_turn(turn) -> tuple:
    if not isinstance(turn, Mapping):
        return (type(turn).__name__,)
    content = turn.get("content")
    kind = "empty" if not content else type(content).__name__
    if isinstance(content, list):
        kind = tuple(sorted({str(block.get("type")) for block in content if isinstance(block, Mapping)}))
    thinks = isinstance(content, str) and "</think>" in content
    keys = tuple(sorted(key for key, value in turn.items() if value not in (None, "", []) and key != "content"))
    return turn.get("role"), kind, thinks, keys


def _texts(value) -> Iterator[str]:
    """The texts that someone wrote in a prompt or an answer."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for turn in value:
            content = turn.get("content") if isinstance(turn, Mapping) else None
            if isinstance(content, str):
                yield content
            elif isinstance(content, list):
                yield from (
                    block["text"]
                    for block in content
                    if isinstance(block, Mapping) and isinstance(block.get("text"), str)
                )


def _begins_with(answer, prompt) -> bool:
    """Whether an answer begins with the prompt, or with the end of it."""
    if isinstance(prompt, str) or isinstance(answer, str):
        both = isinstance(prompt, str) and isinstance(answer, str) and bool(prompt.strip())
        return both and answer.strip().startswith(prompt.strip())
    said = [(turn.get("role"), turn.get("content")) for turn in answer]
    asked = [(turn.get("role"), turn.get("content")) for turn in prompt]
    shared = [n for n in range(1, min(len(said), len(asked)) + 1) if said[:n] == asked[-n:]]
    return any(asked[-n:][0][0] != "assistant" for n in shared)
