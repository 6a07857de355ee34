"""`posttrain data`: what a data set holds, which of its tokens are learned, copies converted or with flipped labels."""

import contextlib
import gzip
import json
import os
import tempfile
from pathlib import Path

from posttrain.cli import _rewards
from posttrain.errors import ConfigError, DataError, EnvironmentIssue

OUT_SUFFIXES = (".jsonl", ".jsonl.gz")
# Of longer sequences the middle is not shown.
SHOWN_TOKENS = 600
SHOWN_CHARACTERS = 2000


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "data",
        help="look at a data set's rows and tokens, measure it, convert it, flip some of its labels",
        description="Looks at a data set before anything is trained on it.",
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)

    inspect = actions.add_parser("inspect", help="format, and rows as training sees them: supervised tokens coloured")
    _add_source(inspect)
    _add_as_is(inspect)
    inspect.add_argument("--model", metavar="MODEL", help="whose tokenizer: a hub id, a folder, embedded:tiny")
    inspect.add_argument("--rows", type=int, default=1, metavar="N", help="rows to show; default: 1")

    stats = actions.add_parser("stats", help="counts, lengths, and what max_length leaves of the rows")
    _add_source(stats)
    _add_as_is(stats)
    stats.add_argument("--model", metavar="MODEL", help="count this model's tokens; default: characters")
    stats.add_argument(
        "--max-length", "--max_length", type=int, default=1024, metavar="N", help="in tokens; default: 1024"
    )
    stats.add_argument("--limit", type=int, metavar="N", help="read the first rows only")
    _rewards.add_options(stats)

    convert = actions.add_parser("convert", help="write a copy in the form that training reads, messages and all")
    _add_source(convert)
    convert.add_argument("out", metavar="OUT", help="a .jsonl or .jsonl.gz file")
    convert.add_argument("--to", choices=("pairs", "answers", "tasks"), help="where rows can be read in several ways")
    convert.add_argument("--limit", type=int, metavar="N", help="read the first rows only")
    convert.add_argument("--force", action="store_true", help="write over OUT")

    flip = actions.add_parser("flip", help="write a copy in which some rows have chosen and rejected swapped")
    _add_source(flip)
    flip.add_argument("out", metavar="OUT", help="a .jsonl or .jsonl.gz file; its column flipped says which rows")
    flip.add_argument("--rate", type=float, required=True, metavar="R", help="share of the rows to swap, in [0, 1)")
    flip.add_argument("--seed", type=int, default=0, metavar="N", help="which rows; default: 0")
    flip.add_argument("--force", action="store_true", help="write over OUT")


def _add_source(parser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a .json, .jsonl, .jsonl.gz or .parquet file, a hub id, or generated:reverse_list",
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="of a hub data set; default: train")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_as_is(parser) -> None:
    parser.add_argument(
        "--as-is", "--as_is", action="store_true", help="do not convert the shapes of well-known data sets"
    )


def run(args) -> int:
    """Do one of the actions; exit code 3 where the data cannot be trained on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("rows", "limit", "max_length"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    return {"inspect": _inspect, "stats": _stats, "convert": _convert, "flip": _flip}[args.action](args)


def _inspect(args) -> int:
    from posttrain.data import formats

    source = _Source(args)
    if not args.json:
        print(f"{source.heading()}\n")
    if args.model is None or source.format.kind == formats.UNKNOWN:
        shown = [{"row": number, "values": row} for number, row in enumerate(source.rows[: args.rows], 1)]
        if args.json:
            _print_json(source.facts() | {"examples": shown})
        else:
            _print_values(shown)
        return 0

    from posttrain.cli import _tokens
    from posttrain.data import tokens
    from posttrain.data.lengths import end_of_turn_tokens, last_token
    from posttrain.data.schema import template_facts

    processing_class = source.processing_class()
    tokenizer = tokens.tokenizer_of(processing_class)
    colour = not args.json and _tokens.colour_is_wanted()
    examples = []
    for number, row in enumerate(source.rows[: args.rows], 1):
        for part, ids, supervised in tokens.sequences(row, source.format, processing_class, source.places[number - 1]):
            pieces = _tokens.pieces(ids, supervised, tokenizer)
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
                print(f"row {number}, {part}: {len(ids)} tokens, {sum(supervised)} of them supervised, with {ends}")
                _tokens.show(pieces, SHOWN_TOKENS, colour)
                print()
    facts = template_facts(processing_class)
    said = source.findings(processing_class, args.rows)
    if args.json:
        _print_json(source.facts() | {"examples": examples, "template": facts, "warnings": said})
        return 0
    print("Supervised tokens are " + ("green." if colour else "in brackets."))
    words = {True: "yes", False: "no", None: "cannot be told"}
    preserving = words[facts["prefix_preserving"]]
    print(f"The chat template renders earlier messages alike whatever follows: {preserving}.")
    if facts["stop_token_trained"] is not None:
        trained = words[facts["stop_token_trained"]]
        print(f"Its marks of what the assistant says take in the end of the turn: {trained}.")
    for line in said:
        print(line)
    return 0


def _print_values(shown: list[dict]) -> None:
    from posttrain.cli._tokens import visible

    for example in shown:
        print(f"row {example['row']}")
        for name, value in example["values"].items():
            print(f"  {visible(name)}: {visible(_cut(_shown(value)))}")
        print()
    print("With --model MODEL: its tokens, and which of them are supervised.")


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


def _stats(args) -> int:
    from posttrain.data import formats

    source = _Source(args, args.limit)
    report = source.facts()
    if source.format.kind in formats.PAIR_KINDS:
        report |= source.pair_facts(args.max_length)
    else:
        report |= source.other_facts(args.max_length)
    drawn = _rewards.facts(args, source.columns, source.rows[0])
    if "not_drawn" in drawn:
        report["warnings"] = [*report["warnings"], drawn["not_drawn"]]
    else:
        report |= drawn
    if args.json:
        _print_json(report)
        return 0

    from posttrain.data.lengths import QUANTILES
    from posttrain.reporting import format_table

    print(source.heading())
    for name in ("empty", "identical"):
        if name in report:
            print(f"{name} sides: {report[name]} of {len(source.rows)} rows")
    headers = (report["unit"], *QUANTILES)
    print("\n" + format_table(headers, [(part, *values.values()) for part, values in report["lengths"].items()]) + "\n")
    for line in (*report["notes"], *report["warnings"]):
        print(line)
    _rewards.draw(drawn)
    return 0


def _out(args) -> Path:
    """The file to write; ConfigError for one of another kind, or that is there already."""
    out = Path(args.out).expanduser()
    if not out.name.endswith(OUT_SUFFIXES):
        raise ConfigError(f"OUT is {args.out}; its name must end in {' or '.join(OUT_SUFFIXES)}.")
    if out.is_dir() or (out.exists() and not args.force):
        raise ConfigError(f"{out} exists already. Name another file" + ("." if out.is_dir() else ", or add --force."))
    return out


def _convert(args) -> int:
    from posttrain.cli import _console

    out = _out(args)
    _console.quiet_libraries()
    from posttrain.data import shapes, turns
    from posttrain.data.rows import cells, columns_of, read_rows, rows_of

    rows, places = read_rows(args.source, args.split, args.limit)
    rows = turns.read_all(rows, places, args.source)
    found = shapes.of_any_kind(columns_of(rows), rows[0], args.to, args.source)
    made, places = shapes.as_ours(rows, places, found, args.source)
    _write_lines(out, rows_of(cells(made, places)))
    if args.json:
        facts = {"output": str(out), "rows": len(made), "read": len(rows), "from": found.name, "to": found.kind}
        _print_json(facts | {"why": found.why})
    else:
        print(f"{out}: {len(made)} rows ({found.kind}) of {len(rows)} {found.name} rows ({found.why})")
    return 0


def _flip(args) -> int:
    if not 0 <= args.rate < 1:
        raise ConfigError(f"--rate is {args.rate}; it must lie in [0, 1): the share of the rows to swap.")
    out = _out(args)

    import datasets

    from posttrain.data import shapes
    from posttrain.data.corruption import flip_row, lone_columns, rows_to_flip
    from posttrain.data.rows import cells, columns_of, read_rows, rows_of

    datasets.disable_progress_bars()
    rows, places = read_rows(args.source, args.split)
    for row, place in zip(rows, places, strict=True):
        missing = [name for name in ("chosen", "rejected") if name not in row]
        if missing:
            shape = shapes.find(list(row), row, (shapes.PAIRS,), place)
            remedy = f" Convert these {shape.name} rows first, with `posttrain data convert`." if shape else ""
            raise DataError(
                f"{place}: {' and '.join(map(repr, missing))} missing; found {columns_of([row])}. Only preference "
                f"pairs can be flipped: every row needs chosen and rejected.{remedy}"
            )
    chosen = rows_to_flip(len(rows), args.rate, args.seed)
    flipped = [flip_row(row, index in chosen) for index, row in enumerate(rows)]
    swapped = len(chosen)
    lost = lone_columns(row for index, row in enumerate(rows) if index in chosen)
    _write_lines(out, rows_of(cells(flipped, places)))
    if args.json:
        facts = {"output": str(out), "rows": len(rows), "flipped": swapped, "rate": args.rate, "seed": args.seed}
        _print_json(facts | ({"warnings": lost} if lost else {}))
    else:
        print(f"{out}: {len(rows)} rows, {swapped} of them with chosen and rejected swapped (seed {args.seed})")
        for said in lost:
            print(said)
    return 0


def _write_lines(path: Path, rows) -> None:
    """A JSON line per row, all of them or no file; equal rows give equal bytes."""
    target = path.resolve()
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as raw:
            # without the name and time that gzip would write
            packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else contextlib.nullcontext(raw)
            with packed as file:
                for row in rows:
                    file.write(_line(row))
            raw.flush()
            os.fsync(raw.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        raise EnvironmentIssue(
            f"{path} cannot be written ({error.strerror or error}); nothing was left there."
        ) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _line(row: dict) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        return json.dumps(row).encode() + b"\n"


class _Source:
    """The rows that SOURCE names, and what they are."""

    def __init__(self, args, limit: int | None = None):
        from posttrain.cli import _console

        _console.quiet_libraries()
        from posttrain.data import formats, shapes, turns
        from posttrain.data.columns import first_with_system, say_system
        from posttrain.data.formats import detect
        from posttrain.data.rows import columns_of, read_rows

        self.name, self.model = args.source, args.model
        self.rows, self.places = read_rows(args.source, args.split, limit)
        self.rows = turns.read_all(self.rows, self.places, args.source)
        self.shape = None if args.as_is else shapes.find(columns_of(self.rows), self.rows[0], name=args.source)
        self.rows, self.places = shapes.as_ours(self.rows, self.places, self.shape, args.source)
        self.columns = columns_of(self.rows)
        self.format = detect(self.columns, self.rows[0])
        self._given = None
        if self.shape is None and not args.as_is and self.format.kind in (formats.UNKNOWN, formats.PROMPT_ONLY):
            self._given = self.rows
            self._read_tasks(True)
        with_system = first_with_system(self.rows)
        # alpaca's and sharegpt's is read with their rows
        if with_system is not None and not self.format.kind.startswith(("alpaca", "sharegpt")):
            say_system(with_system, args.source)

    def _read_tasks(self, conversational: bool) -> None:
        """Rows of tasks as the recipes with rewards make them; others, and those they would refuse, stay."""
        from posttrain.data import formats, shapes
        from posttrain.data.demonstrations import as_tasks
        from posttrain.data.known_shapes import anything
        from posttrain.data.rows import columns_of
        from posttrain.log import get_logger

        try:
            found = as_tasks(self._given, self.places, self.name, conversational)
        except DataError as error:
            get_logger().warning("the rows are shown as they are, since they cannot be read as tasks: %s", error)
            found = None
        if found is None:
            self._given = None
            return
        self.rows, names = found
        reads = ", ".join(f"{theirs} is the {ours}" for ours, theirs in names.items())
        turn = "a user's turn (conversational: true)" if conversational else "a text (conversational: false)"
        reads += f"; a prompt that is a text is seen as {turn}"
        self.shape = shapes.Shape("task", shapes.TASKS, tuple(names.values()), anything, None, reads)
        self.columns = columns_of(self.rows)
        self.format = formats.detect(self.columns, self.rows[0])

    def heading(self) -> str:
        from posttrain.cli._tokens import visible

        columns = visible(", ".join(self.columns))
        converted = f"{self.shape.name} rows, converted to {self.shape.kind} ({self.shape.why})\n" if self.shape else ""
        return converted + (
            f"{self.name}: {len(self.rows)} rows; columns {columns}\nformat: {self.format} ({visible(self.format.why)})"
        )

    def facts(self) -> dict:
        kind = {"kind": self.format.kind, "style": self.format.style, "why": self.format.why}
        facts = {"source": self.name, "rows": len(self.rows), "columns": self.columns, "format": kind}
        if self.shape:
            facts["converted"] = {"from": self.shape.name, "to": self.shape.kind, "why": self.shape.why}
        return facts

    def processing_class(self):
        from posttrain.data.tokens import load_processing_class
        from posttrain.models import resolve_model

        self.model = resolve_model(self.model)
        processing_class = load_processing_class(self.model)
        if self._given is not None and not processing_class.chat_template:
            # a base model's recipe sets conversational: false
            self._read_tasks(False)
        return processing_class

    def findings(self, processing_class, rows: int | None = None) -> list[str]:
        """What the rows' rendering shows, a sentence each; DataError where the model would learn something else."""
        from posttrain.data import formats, rendering
        from posttrain.data.rows import as_dataset

        if self.format.kind in (formats.UNKNOWN, formats.TOKENISED):
            return []
        places, shown = self.places[:rows], self.rows[:rows]
        if self.format.kind in (
            formats.ALPACA,
            formats.ALPACA_PREFERENCE,
            formats.SHAREGPT,
            formats.SHAREGPT_PREFERENCE,
        ):
            found = zip(shown, places, strict=True)
            shown = [formats.convert_row(row, self.format, place) for row, place in found]
        found = rendering.check(as_dataset(shown, self.name), processing_class, self.name, places)
        is_text = (self.format.kind, self.format.style) == (formats.PROMPT_ONLY, "standard")
        if is_text and processing_class.chat_template:
            found.notes.append(
                "The prompts are shown as the texts that they are. The recipes with rewards make a user's turn of "
                "each, unless conversational is false."
            )
        return found.notes + found.warnings

    def pair_facts(self, max_length: int) -> dict:
        """Counts, lengths and warnings of preference pairs; DataError where they cannot be trained on."""
        from posttrain.data import schema, values
        from posttrain.data.rows import as_dataset

        # As they are in the file, whose lines a data set does not know, but all with the same columns, as there
        columns = dict.fromkeys(name for name in values.COLUMNS if name in self.columns)
        rows = ((place, columns | row) for place, row in zip(self.places, self.rows, strict=True))
        counts, warnings = values.scan_pairs(rows, self.name)
        facts = {"empty": counts["empty"], "identical": counts["identical"], "notes": [], "warnings": warnings}
        if self.model is None:
            return facts | self._sizes([name for name in ("prompt", "chosen", "rejected") if name in self.columns])
        processing_class = self.processing_class()
        data = as_dataset(self.rows, self.name)
        stop_ids = schema.generation_stop_ids(self.model)
        report = schema.examine_preferences(
            data, processing_class, max_length, self.name, stop_ids=stop_ids, places=self.places
        )
        lengths = report.lengths
        of = f"the {lengths.rows} rows looked at" if report.is_sample else f"{report.rows} rows"
        drops = "" if lengths.dropped else ", and drops none"
        notes = [
            f"max_length {max_length} cuts {lengths.cut} of {of}{drops}; {lengths.whole_99} keeps 99% of them whole"
        ]
        if report.end_of_turn is not None:
            notes.append(
                f"{report.ended:.1%} of the answers end with an end-of-turn token, mostly {report.end_of_turn!r}"
            )
        notes += report.notes
        facts |= {"unit": "tokens", "lengths": lengths.parts, "notes": notes, "warnings": report.warnings}
        return facts | {"report": report.to_dict()}

    def other_facts(self, max_length: int) -> dict:
        """Lengths of rows that are no preference pairs."""
        from posttrain.data import formats, schema, tokens
        from posttrain.data.lengths import quantiles

        facts = {"notes": [], "warnings": []}
        if self.model is None or self.format.kind == formats.UNKNOWN:
            known = formats.KNOWN_COLUMNS if self.format.kind != formats.UNKNOWN else self.columns
            return facts | self._sizes([name for name in self.columns if name in known])
        processing_class, found = self.processing_class(), {}
        rows = len(self.rows)
        indices = range(rows) if rows <= schema.SAMPLE else [i * rows // schema.SAMPLE for i in range(schema.SAMPLE)]
        for index in indices:
            for part, ids, supervised in tokens.sequences(
                self.rows[index], self.format, processing_class, self.places[index]
            ):
                found.setdefault(part, []).append(len(ids))
                found.setdefault(f"{part}, supervised", []).append(sum(supervised))
        parts = {part: quantiles(values) for part, values in found.items()}
        longest = max(values["99%"] for values in parts.values())
        facts["notes"].append(f"max_length {longest} keeps 99% of the rows whole")
        facts["warnings"] += self.findings(processing_class)
        return facts | {"unit": "tokens", "lengths": parts}

    def _sizes(self, columns: list[str]) -> dict:
        from posttrain.data import formats
        from posttrain.data.lengths import quantiles

        unit, measure = "characters", _characters
        if self.format.kind == formats.TOKENISED:
            unit, measure, columns = "tokens", len, formats.TOKEN_COLUMNS
        sizes = {name: [measure(row.get(name)) for row in self.rows] for name in columns}
        return {"unit": unit, "lengths": {name: quantiles(values) for name, values in sizes.items()}}


def _characters(value) -> int:
    """The length of the texts in a value, of messages without their roles."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(item) for name, item in value.items() if name not in ("role", "from", "type"))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _print_json(report: dict) -> None:
    print(json.dumps(report, indent=1, default=str))
