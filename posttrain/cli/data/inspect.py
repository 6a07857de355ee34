"""`posttrain data inspect`: format, and rows as training sees them."""

import json

from posttrain.cli.data.source import Source, add_as_is, add_source, print_json
from posttrain.console import say
from posttrain.visible import one_line, visible

# Of longer sequences the middle is not shown.
SHOWN_TOKENS = 600
SHOWN_CHARACTERS = 2000


def add_parser(actions) -> None:
    parser = actions.add_parser("inspect", help="format, and rows as training sees them: supervised tokens coloured")
    add_source(parser)
    add_as_is(parser)
    parser.add_argument("--model", metavar="MODEL", help="whose tokenizer: a hub id, a folder, embedded:tiny")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="rows to show; default: 1")
    parser.set_defaults(run_action=run)


def run(args) -> int:
    from posttrain.data import formats

    source = Source(args)
    if not args.json:
        say(f"{source.heading()}\n")
    if args.model is None or source.format.kind == formats.UNKNOWN:
        shown = [{"row": number, "values": row} for number, row in enumerate(source.rows[: args.rows], 1)]
        if args.json:
            print_json(source.facts() | {"examples": shown})
        else:
            _print_values(shown)
        return 0

    from posttrain.cli.data import token_view
    from posttrain.data import tokens
    from posttrain.data.lengths import end_of_turn_tokens, last_token
    from posttrain.data.processing import template_facts, tokenizer_of

    processing_class = source.processing_class()
    tokenizer = tokenizer_of(processing_class)
    colour = not args.json and token_view.colour_is_wanted()
    examples = []
    for number, row in enumerate(source.rows[: args.rows], 1):
        for part, ids, supervised in tokens.sequences(row, source.format, processing_class, source.places[number - 1]):
            pieces = token_view.pieces(ids, supervised, tokenizer)
            end = last_token([token for token, mark in zip(ids, supervised, strict=True) if mark], tokenizer)
            example = {
                "row": number,
                "part": part,
                "tokens": len(ids),
                "supervised": sum(supervised),
                "end_of_turn": tokenizer.decode([end]) if end in end_of_turn_tokens(tokenizer) else None,
            }
            examples.append(example | {"pieces": [{"text": text, "supervised": mark} for text, mark in pieces]})
            if not args.json:
                ends = f"the end of turn {example['end_of_turn']!r}" if example["end_of_turn"] else "no end of turn"
                say(f"row {number}, {part}: {len(ids)} tokens, {sum(supervised)} of them supervised, with {ends}")
                token_view.show(pieces, SHOWN_TOKENS, colour)
                say()
    facts = template_facts(processing_class)
    said = source.findings(processing_class, args.rows)
    if args.json:
        print_json(source.facts() | {"examples": examples, "template": facts, "warnings": said})
        return 0
    say("Supervised tokens are " + ("green." if colour else "in brackets."))
    words = {True: "yes", False: "no", None: "cannot be told"}
    preserving = words[facts["prefix_preserving"]]
    say(f"The chat template renders earlier messages alike whatever follows: {preserving}.")
    if facts["stop_token_trained"] is not None:
        trained = words[facts["stop_token_trained"]]
        say(f"Its marks of what the assistant says take in the end of the turn: {trained}.")
    for line in said:
        say(line)
    return 0


def _print_values(shown: list[dict]) -> None:
    for example in shown:
        say(f"row {example['row']}")
        for name, value in example["values"].items():
            say(f"  {one_line(name)}: {_cut(visible(_shown(value)))}")
        say()
    say("With --model MODEL: its tokens, and which of them are supervised.")


def _cut(text: str) -> str:
    left_out = len(text) - SHOWN_CHARACTERS
    if left_out <= 0:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n... {left_out} characters left out ...\n{text[-half:]}"


def _shown(value) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return "".join(f"\n    {turn['role']}: {_shown(turn.get('content'))}" for turn in value)
    return json.dumps(value, ensure_ascii=False, default=str)
