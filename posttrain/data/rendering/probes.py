"""One row against its rendering: its own texts searched in the tokens, and markers put through the chat template."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial

from posttrain.data.processing import tokenizer_of
from posttrain.data.rendering import additions, round_trips, values
from posttrain.data.rendering.applied import control_tokens
from posttrain.data.rendering.faults import Fault, short
from posttrain.data.rendering.markers import marked
from posttrain.data.rendering.marks import REASONING
from posttrain.data.rendering.round_trips import bare as _bare
from posttrain.data.tokens import render_text

_OPENING = ("system", "developer")
_BLANKS = re.compile(r"\s")
_THOUGHT = re.compile(r"(<think>)?((?!<think>).)*?</think>", re.DOTALL)
_ANSWERS = ("chosen", "rejected", "completion", "demonstration", "messages", "text")


def prompt_of(row: Mapping):
    """Return the prompt of a row, its own or the one that both sides begin with; None where it has none."""
    return _split(row)[0]


def answers_of(row: Mapping) -> dict:
    """Return the answers of a row by their columns, without the prompt where they begin with it."""
    return _split(row)[1]


class Probe:
    """The conversations of a row, and how they render. `settings`: of the template, beside the row's own."""

    def __init__(self, row: Mapping, processing_class, settings: Mapping | None = None):
        self.prompt, self.answers = _split(row)
        self._begun = 0
        self.processing_class = processing_class
        self.row = {"tools": row.get("tools")}
        self.row["chat_template_kwargs"] = {**(settings or {}), **(row.get("chat_template_kwargs") or {})}

    def faults(self, learned: Mapping[str, str]) -> Iterator[Fault]:
        """Tell what the rendering does to the row; `learned`: the texts of its tokens, of `prompt` and each answer."""
        conversations = self.answers or {"prompt": None}
        for name, answer in conversations.items():
            if isinstance(self.prompt, str) or isinstance(answer, str):
                yield from self._text_faults(self.prompt or "", answer or "", name, learned)
            else:
                yield from self._faults(self.prompt or [], answer or [], name, learned)
        yield from self._added_faults(learned)

    def _added_faults(self, learned: Mapping) -> Iterator[Fault]:
        """Tell what the template writes into the learned answers; of whole conversations no answer is told apart."""
        answers = {name: answer for name, answer in self.answers.items() if name not in ("messages", "text")}
        if isinstance(self.prompt, list) and all(isinstance(answer, list) for answer in answers.values()):
            control = control_tokens(tokenizer_of(self.processing_class))
            yield from additions.faults(self.prompt, answers, learned, control, self._rendered_with)

    def _rendered_with(self, messages: list, setting: str, **options) -> str:
        """Render messages with a setting of the template off."""
        kwargs = {**self.row["chat_template_kwargs"], setting: False}
        return render_text(messages, {**self.row, "chat_template_kwargs": kwargs}, self.processing_class, **options)

    def _text_faults(self, prompt: str, answer: str, name: str, learned: Mapping) -> Iterator[Fault]:
        whole = learned.get("prompt", "") + (learned.get(name, "") if name != "prompt" else "")
        faults = list(self._tokenizer_faults(prompt + answer))
        yield from faults
        if not faults and not self._is_in(whole, prompt + answer):
            yield Fault(
                ("text",),
                "the tokens are not those of the whole text",
                repr(short(whole)),
                "The tokenizer changes or leaves out characters; see the row with `posttrain data inspect`.",
            )

    def _tokenizer_faults(self, text: str) -> Iterator[Fault]:
        remedy = (
            "Leave those rows out, write the characters in another way, or take a model whose tokenizer knows them."
        )
        for change in round_trips.changes(text, tokenizer_of(self.processing_class)):
            if change.kind in ("lines", "blanks"):
                remedy = "The model cannot learn them; take a model whose tokenizer keeps them."
            yield Fault((change.kind,), change.what, repr(short(text)), remedy)

    def _faults(self, prompt: list, answer: list, name: str, learned: Mapping) -> Iterator[Fault]:
        messages, start = [*prompt, *answer], len(prompt)
        options = {} if answer else {"add_generation_prompt": True}
        render = partial(self._render, tools=self.row.get("tools"), **options)
        stands, pieces, names = marked(messages, self.row.get("tools"))
        try:
            drawn = self._render(*stands, **options)
        # a template may want content of some form; what it makes of the row itself is known
        except Exception:
            drawn = None
        hay = {part: _bare(learned.get(part, "")) for part in ("prompt", name)}
        if name != "prompt":
            # a generation prompt can end with what the answer begins with, such as <think>
            self._begun, hay[name] = len(hay["prompt"]), hay["prompt"] + hay[name]
        at = {"prompt": 0, name: 0}
        places, wholly_lost, calls_lost, rendered = [], set(), set(), None
        for piece in pieces:
            if piece.kind == "arguments of tool calls" and piece.index in calls_lost:
                continue
            part = name if piece.index >= start or not prompt else "prompt"
            seen = None if drawn is None else drawn.count(piece.marker)
            message = messages[piece.index]
            if piece.kind == "content":
                found = self._find(hay[part], piece.text, at[part], part != "prompt")
                fault = self._content_fault(piece, messages, part, seen, found, hay, name, start, options)
                if found is not None:
                    at[part] = found
                # what opens a conversation may stand anywhere
                if seen == 1 and not all(turn.get("role") in _OPENING for turn in messages[: piece.index + 1]):
                    places.append((drawn.index(piece.marker), piece))
            else:
                fault = self._other_fault(piece, message, part, seen, hay[part])
                if fault is not None and piece.kind == "tool calls":
                    calls_lost.add(piece.index)
            if fault is not None:
                wholly_lost.add(piece.index)
                yield fault
                continue
            changed = list(self._tokenizer_faults(piece.text))
            yield from changed
            if not changed and piece.kind in ("content", *REASONING) and _BLANKS.search(piece.text.strip()):
                if rendered is None:
                    rendered = values.rendered(messages, render)
                yield from self._line_faults(piece, messages, rendered)
        yield from self._order_faults(places)
        if names and drawn is not None and not any(marker in drawn for marker in names.values()):
            yield Fault(
                ("tools",), "the chat template drops the tools", ", ".join(names),
                "The model is not told of them; use a template that renders tools, or leave the column out.",
            )  # fmt: skip
        for index in range(len(messages)):
            if index not in wholly_lost:
                part = name if index >= start or not prompt else "prompt"
                yield from values.faults(messages, index, learned.get(part, ""), render)

    def _line_faults(self, piece, messages: list, rendered: str) -> Iterator[Fault]:
        if round_trips.loses_lines(piece.text, rendered):
            role = messages[piece.index].get("role")
            yield Fault(
                ("lines", role),
                f"the chat template loses line breaks or indentation within a message of the role {role}",
                repr(short(piece.text)),
                "Code and lists are seen as one line; use a template that renders the message as it is.",
            )
        elif round_trips.loses_blanks(piece.text, rendered):
            role = messages[piece.index].get("role")
            yield Fault(
                ("blanks", role), f"the chat template loses tabs or blanks within a line of the role {role}",
                repr(short(piece.text)),
                "Tables and code are seen in another form; use a template that renders the message as it is.",
            )  # fmt: skip

    def _content_fault(self, piece, messages, part, seen, found, hay, name, start, options) -> Fault | None:
        message, total = messages[piece.index], len(messages)
        role, shown = message.get("role"), repr(short(piece.text))
        in_answer = piece.index >= start
        if seen == 0:
            asks = not in_answer and piece.index == start - 1
            calls = bool(message.get("tool_calls"))
            kind = "blocks of content" if isinstance(message.get("content"), list) else "the message"
            remedy = (
                "Rename the role to system, or use a template that knows it."
                if role == "developer" and not piece.index
                else "Use a template that renders it, or write the content as a text."
                if isinstance(message.get("content"), list)
                else "The content beside its tool calls is not seen; use a template that renders both."
                if calls
                else "It takes blocks of content, which the model's processor makes: give it as processing_class."
                if self._takes_blocks(messages, piece.index, options)
                else "Join it to the system message that the template renders, or to the user's turn."
                if role in _OPENING and piece.index
                else "Use a template that knows the role, or rename it."
            )
            wrong = (asks or (in_answer and role == "assistant")) and not calls
            return Fault(
                ("dropped", role, in_answer), f"the chat template drops {kind} of the role {role}", shown, remedy,
                wrong or (in_answer and piece.index == total - 1 and not calls),
            )  # fmt: skip
        if seen is not None and seen > 1:
            return Fault(
                ("repeated", role, in_answer), f"the chat template renders a message of the role {role} {seen} times",
                shown, "Use a template that renders it once.", in_answer,
            )  # fmt: skip
        if found is not None:
            return None
        rest = _THOUGHT.sub("", piece.text)
        if rest != piece.text and (not rest.strip() or self._find(hay[part], rest, 0, in_answer) is not None):
            return _lost_reasoning("between <think> and </think>", shown, in_answer)
        if part == "prompt" and part != name and self._find(hay[name], piece.text, 0, True) is not None:
            return Fault(
                ("moved", role), f"a message of the prompt, of the role {role}, is learned as part of the answer",
                shown, "The chat template renders the prompt in another way once an answer follows; use another.", True,
            )  # fmt: skip
        if not hay[part]:
            return None
        return Fault(
            ("changed", role, in_answer), f"the chat template or the tokenizer changes a message of the role {role}",
            shown, "See the row with `posttrain data inspect`, and use a template that renders it as it is.",
        )  # fmt: skip

    def _other_fault(self, piece, message, part, seen, hay: str) -> Fault | None:
        if seen or (seen is None and _bare(piece.text) in hay):
            return None
        shown = repr(short(piece.text))
        if piece.kind in REASONING:
            others = [message.get(key) for key in REASONING if key != piece.kind]
            if piece.text in others and _bare(piece.text) in hay:
                # the same thought under two keys, of which the template reads one
                return None
            return _lost_reasoning(f"in {piece.kind}", shown, part != "prompt")
        if piece.kind == "name":
            return Fault(
                ("name",), "the chat template drops the name of who speaks", shown,
                "Write it into the content where it matters.",
            )  # fmt: skip
        return Fault(
            (piece.kind, part != "prompt"), f"the chat template drops {piece.kind}", shown,
            "Use a template that renders tool calls, or write them into the content as the model is to say them.",
            # an answer of nothing else is learned as an empty one
            piece.kind == "tool calls" and part != "prompt" and not message.get("content"),
        )  # fmt: skip

    def _order_faults(self, places: list) -> Iterator[Fault]:
        for (before, _), (after, piece) in zip(places, places[1:], strict=False):
            if after < before:
                yield Fault(
                    ("order",), "the chat template renders messages in another order", repr(short(piece.text)),
                    "Use a template that keeps the order.",
                )  # fmt: skip
                return

    def _takes_blocks(self, messages: list, index: int, options) -> bool:
        """Tell whether the template, which drops the text of a message, renders it as a block in the same place."""
        message = {**messages[index], "content": [{"type": "text", "text": "qzblockzq"}]}
        try:
            changed = [*messages[:index], message, *messages[index + 1 :]]
            return "qzblockzq" in self._render(changed, self.row.get("tools"), **options)
        # it may take no blocks at all
        except Exception:
            return False

    def _render(self, messages: list, tools, **options) -> str:
        return render_text(messages, {**self.row, "tools": tools}, self.processing_class, **options)

    def _find(self, hay: str, text: str, start: int, in_answer: bool = False) -> int | None:
        """Find where a text ends in what was learned, from `start` on or else anywhere; None where it is not.

        `in_answer`: it has to end behind the prompt.
        """
        for wanted in (_bare(text), _bare(json.dumps(text, ensure_ascii=False)[1:-1]), self._round_trip(text)):
            least = self._begun + 1 - len(wanted) if in_answer else 0
            for begin in {max(start, least, 0): 0, max(least, 0): 0}:
                at = hay.find(wanted, begin)
                if at >= 0:
                    return at + len(wanted)
        return None

    def _is_in(self, hay: str, text: str) -> bool:
        return self._find(_bare(hay), text, 0) is not None

    def _round_trip(self, text: str) -> str:
        """Tell what the tokenizer itself makes of a text: some know no capitals, or only one kind of blank."""
        tokenizer = tokenizer_of(self.processing_class)
        return _bare(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _split(row: Mapping) -> tuple:
    answers = {name: row[name] for name in _ANSWERS if row.get(name) is not None}
    if "prompt" in row or not {"chosen", "rejected"} <= set(answers):
        return row.get("prompt"), answers
    chosen, rejected = answers["chosen"], answers["rejected"]
    length = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    length = min(len(chosen), len(rejected)) if length is None else length
    if isinstance(chosen, str) and length and chosen[length - 1 : length].isspace():
        # as TRL, which leaves a blank to the answer
        length -= 1
    return chosen[:length], {"chosen": chosen[length:], "rejected": rejected[length:]}


def _lost_reasoning(where: str, shown: str, in_answer: bool) -> Fault:
    if in_answer:
        remedy = "The model learns the answer without it; use a template that renders it, or leave it out on purpose."
        return Fault(("reasoning", True), f"the chat template drops the answer's reasoning {where}", shown, remedy)
    remedy = "Many templates leave the reasoning of earlier turns out; this is said once, where there was some."
    return Fault(("reasoning", False), f"the chat template drops the reasoning of the prompt {where}", shown, remedy)
