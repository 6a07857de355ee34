"""How long preference pairs are in tokens, what `max_length` leaves of them, and how their answers end."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.data import formats
from posttrain.data.processing import tokenizer_of
from posttrain.data.rendering import applied, continued
from posttrain.data.tokens import render, tokenized_pairs

# Rows whose prompt is rendered once more, alone.
_PROMPT_ROWS = 64
QUANTILES = {"50%": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Return the median, the 90% and 99% quantiles and the maximum: each the smallest value that covers that share."""
    ordered = sorted(values)
    return {name: ordered[max(math.ceil(share * len(ordered)), 1) - 1] for name, share in QUANTILES.items()}


@dataclass
class Lengths:
    """The lengths of `rows` pairs in tokens, and their ends.

    Attributes:
        parts: for prompt, chosen and rejected the values of `quantiles`.
        shortest_prompt: in tokens. longest: prompt with the longer answer, before cutting. largest_id: of all tokens.
        dropped: rows that lose every completion token to `max_length`; cut: others that lose a part.
        equal: rows kept whose sides are the same tokens; equal_when_cut: of those, the ones that `max_length` made so.
        keeps_99: the smallest max_length that drops no more than 1% of the rows.
        whole_99: the smallest one that leaves 99% of the rows whole.
        last_tokens: how many sides end with which token id, blanks at the end left out.
        trained_last_tokens: the same of the tokens that are trained: of rows that are not dropped, after cutting.
        cut_ends: how many of these lose which last token to `max_length`.
        shortened_prompts: rows, of the first 64, whose prompt loses its end because the template renders it in
            another way before an answer.
        lost_text: the end that the first of those loses.
    """

    rows: int = 0
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    shortest_prompt: int = 0
    longest: int = 0
    largest_id: int = -1
    dropped: int = 0
    cut: int = 0
    equal: int = 0
    equal_when_cut: int = 0
    keeps_99: int = 0
    whole_99: int = 0
    last_tokens: dict[int | None, int] = field(default_factory=dict)
    trained_last_tokens: dict[int | None, int] = field(default_factory=dict)
    cut_ends: dict[int | None, int] = field(default_factory=dict)
    shortened_prompts: int = 0
    lost_text: str = ""


def said_of_prompts(found: Lengths, name: str) -> str:
    """Return a sentence about prompts that lose their end before an answer.

    Empty where none does. `name`: of the data set.
    """
    if not found.shortened_prompts:
        return ""
    return (
        f"{name}: the chat template, or the tokenizer, renders prompts in another way before an answer than alone; "
        f"their end {found.lost_text!r} is left out in training, though generation will see it. Use a template that "
        "renders both the same, or end prompts on a token's boundary."
    )


def measure(dataset, processing_class, places: Sequence[str], max_length: int | None, keep_start: bool) -> Lengths:
    """Tokenise every row as TRL does and measure it. `places`: where each row is, for errors."""
    found, blanks = Lengths(len(dataset)), {}
    last_tokens, trained, cut_ends = Counter(), Counter(), Counter()
    tokenizer = tokenizer_of(processing_class)
    parts: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
    whole = []
    for tokens in tokenized_pairs(dataset, processing_class, places):
        prompt, chosen, rejected = (tokens[name] for name in formats.TOKEN_COLUMNS)
        for part, ids in zip(parts.values(), (prompt, chosen, rejected), strict=True):
            part.append(len(ids))
            found.largest_id = max(found.largest_id, max(ids, default=-1))
        whole.append(len(prompt) + max(len(chosen), len(rejected)))
        ends = [last_token(side, tokenizer, blanks) for side in (chosen, rejected)]
        last_tokens.update(ends)
        room = whole[-1] if max_length is None or not keep_start else max_length - len(prompt)
        if room <= 0:
            found.dropped += 1
            continue
        found.cut += max_length is not None and whole[-1] > max_length
        for side, end in zip((chosen, rejected), ends, strict=True):
            kept = last_token(side[:room], tokenizer, blanks)
            trained[kept] += 1
            cut_ends[end] += kept != end
        if chosen[:room] == rejected[:room]:
            found.equal += 1
            found.equal_when_cut += chosen != rejected
    found.last_tokens, found.trained_last_tokens, found.cut_ends = dict(last_tokens), dict(trained), dict(cut_ends)
    found.parts = {name: quantiles(values) for name, values in parts.items()}
    found.shortest_prompt, found.longest = min(parts["prompt"]), max(whole)
    found.keeps_99 = found.parts["prompt"]["99%"] + 1
    found.whole_99 = quantiles(whole)["99%"]
    _compare_prompts(found, dataset, processing_class, places, parts["prompt"])
    return found


def end_of_turn_tokens(tokenizer) -> set[int]:
    """Return the token ids that can end a turn: eos, and those that were added to the vocabulary, as TRL's own check
    has it.
    """
    return {*tokenizer.get_added_vocab().values(), tokenizer.eos_token_id} - {None}


def last_token(ids: list[int], tokenizer, blanks: dict[int, bool] | None = None) -> int | None:
    """Return the last token that is not blank; None if there is none. `blanks` remembers which ids are."""
    blanks = {} if blanks is None else blanks
    for token in reversed(ids):
        if token not in blanks:
            blanks[token] = not tokenizer.decode([token]).strip()
        if not blanks[token]:
            return token
    return None


def _compare_prompts(found: Lengths, dataset, processing_class, places, kept: list[int]) -> None:
    if "prompt" not in dataset.column_names or "prompt_ids" in dataset.column_names:
        return
    tokenizer = tokenizer_of(processing_class)
    options = {} if isinstance(dataset[0]["prompt"], str) else {"add_generation_prompt": True}
    beginning = None if options else applied.added_beginning(tokenizer)
    rows = dataset.select(range(min(len(dataset), _PROMPT_ROWS)))
    for row, length, place in zip(rows, kept, places, strict=False):
        if continued.words_of(row["prompt"]):
            continue
        # as it is tokenised: without a beginning that the tokenizer adds
        prompt = row["prompt"] if options else applied.without_beginning(row["prompt"], beginning)
        alone = render(prompt, row, processing_class, place, **options)
        if length < len(alone):
            found.lost_text = found.lost_text or tokenizer.decode(alone[length:])
            found.shortened_prompts += 1
