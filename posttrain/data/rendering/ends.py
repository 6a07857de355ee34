"""How answers end: whether the tokens that are trained end the turn, and where a template ends an answer."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from posttrain.data.lengths import Lengths, end_of_turn_tokens
from posttrain.data.rendering.applied import control_tokens
from posttrain.data.rendering.closers import closers
from posttrain.errors import DataError

# What `end_of_turn` can be
CHOICES = ("warn", "require")
# Share of the answers that `max_length` may leave without their end before it is more than a line's note: a few long
# answers are cut in most runs, and the others teach to stop
_FEW = 0.1


class Ends(NamedTuple):
    """How the answers of a data set end.

    Attributes:
        ended: share of them that end with an end-of-turn token as they are trained, cut to max_length.
        end_of_turn: the token that most answers end with; None if it is ordinary text.
        warnings: a sentence each.
    """

    ended: float
    end_of_turn: str | None
    warnings: list[str]


def check_ends(
    name: str,
    lengths: Lengths,
    max_length: int | None,
    tokenizer,
    stop_ids: Iterable[int] = (),
    end_of_turn: str = "warn",
    is_tokenised: bool = False,
) -> Ends:
    """Check whether the answers' trained tokens end with one that ends the turn, and whether generation stops at it.

    Args:
        name: of the data set. lengths: of its rows, cut to `max_length` tokens.
        stop_ids: token ids that end generation. Default: the tokenizer's eos.
        end_of_turn: `require` raises DataError where less than half of the answers keep an end of turn; `warn` says so.
        is_tokenised: the user gave the rows as token ids.
    """
    stop_ids = set(stop_ids)
    enders = end_of_turn_tokens(tokenizer) | stop_ids
    ends, trained = _among(enders, lengths.last_tokens), lengths.trained_last_tokens
    most = max(ends, key=ends.get, default=None)
    ended = sum(_among(enders, trained).values()) / max(sum(trained.values()), 1)
    found = Ends(ended, tokenizer.decode([most]) if ends else None, [])
    fault = _fault(name, lengths, max_length, found, tokenizer, bool(_among(enders, lengths.cut_ends)), is_tokenised)
    if fault and end_of_turn == "require" and ended < 0.5:
        raise DataError(f"{fault} To train all the same, set `end_of_turn: warn`.")
    if fault:
        found.warnings.append(fault)
    stops = stop_ids or {tokenizer.eos_token_id} - {None}
    if ends and most not in stops:
        found.warnings.append(
            f"{name}: answers end with {found.end_of_turn!r}, but generation stops at {_names(stops, tokenizer)}. Set "
            f"`model.generation_config.eos_token_id = {sorted({most, *stops})}`, or it will run on after the answer."
        )
    return found


def _fault(name: str, lengths: Lengths, max_length, found: Ends, tokenizer, is_cut: bool, is_tokenised: bool) -> str:
    """Return a sentence about answers that are trained without their end; empty where there are none."""
    if found.ended == 1:
        return ""
    if found.end_of_turn is None:
        text = tokenizer.decode([token for token in lengths.last_tokens if token is not None][:1])
        fault = (
            f"{name}: no answer ends with an end-of-turn token (the first one's last is {text!r}), so the model would "
            "not learn to stop."
        )
        if is_tokenised:
            return f"{fault} Append the token to chosen_ids and rejected_ids."
        return (
            f"{fault} Some models' chat templates close no turn, and generation stops where the next one opens. For "
            "others use the template of the model's instruct version, or set `tokenizer.chat_template`."
        )
    end = f"an end-of-turn token such as {found.end_of_turn!r}"
    if is_cut and 1 - found.ended <= _FEW:
        return ""
    if is_cut:
        return (
            f"{name}: max_length {max_length} cuts off the end of answers: {1 - found.ended:.1%} of those "
            f"looked at are trained without {end}, and the model learns from them not to stop. max_length "
            f"{lengths.whole_99} keeps 99% of the rows whole."
        )
    return (
        f"{name}: {1 - found.ended:.1%} of the answers looked at do not end with {end}; the model learns from them "
        "not to stop."
    )


def _among(tokens: set, counts: Mapping) -> dict:
    return {token: count for token, count in counts.items() if token in tokens and count}


def _names(ids: Iterable[int], tokenizer) -> str:
    return " or ".join(repr(tokenizer.decode([token])) for token in sorted(ids)) or "no token"


class Closing:
    """Where an answer of the assistant ends for generation, under one tokenizer's chat template.

    Args:
        stop_ids: token ids at which the model's generation stops, beside the tokenizer's eos; none if not known.
    """

    def __init__(self, tokenizer, stop_ids: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self.stop_ids = set(stop_ids)
        # answers whose template closes no turn, and whose template closes it where generation does not stop
        self.unclosed, self.unstopped = 0, 0
        self._tails: dict[str, list[int]] = {}
        self._closers = closers(tokenizer, control_tokens(tokenizer))

    def text(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens of a plain text, up to the first of the stop tokens at its end.

        To others eos is appended.
        """
        ids, eos = list(ids), self.tokenizer.eos_token_id
        stops, end = self.stop_ids | {eos}, None
        for i in reversed(range(len(ids))):
            if ids[i] in stops:
                end = i + 1
            elif self.tokenizer.decode([ids[i]]).strip():
                self.unstopped += end is None and self.tokenizer.decode([ids[i]]) in self._closers
                break
        return [*ids, eos] if end is None else ids[:end]

    def messages(
        self, ids: Sequence[int], prompt: list, tools, kwargs: Mapping, calling: Mapping | None = None
    ) -> list[int]:
        """Return the tokens that a template renders of an answer behind `prompt`, up to the one at which generation
        stops.

        That is the first stop token behind the answer's text. Where none are known it is the template's own end of
        turn: the last of the first unbroken run of special tokens there. What a template writes behind it (a line
        break, another special token) no rollout reaches. Where there is none, the tokenizer's eos is appended.
        `calling`: the answer where it calls tools, which templates end in another way.

        Raises DataError where the template renders nothing of an answer.
        """
        tail = self._tail(ids, prompt, tools, kwargs, calling)
        ids, eos = list(ids), self.tokenizer.eos_token_id
        start = len(ids) - len(tail)
        enders = end_of_turn_tokens(self.tokenizer) | self.stop_ids
        own = next((i for i, token in enumerate(tail) if token in enders), None)
        if own is None:
            self.unclosed += 1
            return [*ids, eos]
        while own + 1 < len(tail) and tail[own + 1] in enders:
            own += 1
        if not self.stop_ids:
            return ids[: start + own + 1]
        stop = next((i for i, token in enumerate(tail) if token in self.stop_ids | {eos}), None)
        if stop is None:
            self.unstopped += 1
            return [*ids[: start + own + 1], eos]
        return ids[: start + stop + 1]

    def _tail(self, ids: Sequence[int], prompt: list, tools, kwargs: Mapping, calling: Mapping | None) -> list[int]:
        """Tell what the template writes behind an answer: the common end of two made-up ones."""
        key = repr((sorted(kwargs.items(), key=repr), tools, calling is None))
        tail = self._tails.get(key)
        if tail is None or list(ids[max(len(ids) - len(tail), 0) :]) != tail:
            made = ({"role": "assistant", "content": t} if calling is None else _with_call(calling, t) for t in "AB")
            one, other = (self._rendered([*prompt, message], tools, kwargs) for message in made)
            if one == other:
                what = "an answer that is a text" if calling is None else "tool calls"
                remedy = "of a text model" if calling is None else "that renders tool calls"
                raise DataError(
                    f"the chat template renders nothing of {what}. Use a template {remedy}, or give prompt and "
                    "demonstration as text with the template applied."
                )
            tail = self._tails[key] = _common_end(one, other)
        return tail

    def _rendered(self, messages: list, tools, kwargs: Mapping) -> list[int]:
        kwargs = {"tools": tools, "tokenize": True, "return_dict": True, **kwargs}
        return self.tokenizer.apply_chat_template(messages, **kwargs)["input_ids"]


def _with_call(message: Mapping, name: str) -> dict:
    """Return a message whose last tool call is one of a made-up function, in the form of the call that was there."""
    *others, last = message["tool_calls"]
    function = last.get("function", last)
    arguments = {name: name} if isinstance(function.get("arguments"), Mapping) else json.dumps({name: name})
    made = {**function, "name": name, "arguments": arguments}
    return {**message, "tool_calls": [*others, {**last, "function": made} if "function" in last else made]}


def _common_end(one: Sequence[int], other: Sequence[int]) -> list[int]:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return list(one[len(one) - length :])
