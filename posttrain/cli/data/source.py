"""The rows that a verb of `posttrain data` reads, and what they are."""

from posttrain.console import say_json
from posttrain.errors import DataError
from posttrain.private import hide
from posttrain.visible import listed, one_line


def add_source(parser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a .json, .jsonl, .jsonl.gz or .parquet file, a hub id, generated:NAME (reverse_list, arithmetic, "
        "modular_sum) or gym:NAME; options follow as ?n=256&seed=0",
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="of a hub data set; default: train")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_as_is(parser) -> None:
    parser.add_argument(
        "--as-is", "--as_is", action="store_true", help="do not convert the shapes of well-known data sets"
    )


class Source:
    """The rows that SOURCE names, and what they are."""

    def __init__(self, args, limit: int | None = None):
        from posttrain import quiet

        quiet.quiet_libraries()
        from posttrain.data import formats, shapes, turns
        from posttrain.data.columns import first_with_system, log_system_messages
        from posttrain.data.formats import detect
        from posttrain.data.rows import columns_of
        from posttrain.data.sources import half_characters, read_rows
        from posttrain.log import get_logger

        self.name, self.model = args.source, args.model
        self.rows, self.places = read_rows(args.source, args.split, limit)
        if half := half_characters(self.rows, self.places):
            if self.model is not None:
                raise half
            get_logger().warning("%s Training refuses it.", half)
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
            log_system_messages(with_system, args.source)

    def _read_tasks(self, conversational: bool) -> None:
        """Make rows of tasks as the recipes with rewards make them; others, and those they would refuse, stay."""
        from posttrain.data import formats, shapes
        from posttrain.data.known_shapes import anything
        from posttrain.data.rows import columns_of
        from posttrain.data.tasks.loading import as_tasks
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
        columns = listed(self.columns)
        converted = f"{self.shape.name} rows, converted to {self.shape.kind} ({self.shape.why})\n" if self.shape else ""
        return converted + (
            f"{one_line(hide(self.name))}: {len(self.rows)} rows; columns {columns}\n"
            f"format: {self.format} ({one_line(self.format.why)})"
        )

    def facts(self) -> dict:
        kind = {"kind": self.format.kind, "style": self.format.style, "why": self.format.why}
        facts = {"source": hide(self.name), "rows": len(self.rows), "columns": self.columns, "format": kind}
        if self.shape:
            facts["converted"] = {"from": self.shape.name, "to": self.shape.kind, "why": self.shape.why}
        return facts

    def processing_class(self):
        from posttrain.data.processing import load_processing_class
        from posttrain.models import resolve_model

        self.model = resolve_model(self.model)
        processing_class = load_processing_class(self.model)
        if self._given is not None and not processing_class.chat_template:
            # a base model's recipe sets conversational: false
            self._read_tasks(False)
        return processing_class

    def findings(self, processing_class, rows: int | None = None) -> list[str]:
        """Tell what the rows' rendering shows, a sentence each.

        DataError where the model would learn something else.
        """
        from posttrain.data import formats
        from posttrain.data.rendering import row_checks
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
        found = row_checks.check(as_dataset(shown, self.name), processing_class, self.name, places)
        is_text = (self.format.kind, self.format.style) == (formats.PROMPT_ONLY, "standard")
        if is_text and processing_class.chat_template:
            found.notes.append(
                "The prompts are shown as the texts that they are. The recipes with rewards make a user's turn of "
                "each, unless conversational is false."
            )
        return found.notes + found.warnings

    def pair_facts(self, max_length: int) -> dict:
        """Collect counts, lengths and warnings of preference pairs; DataError where they cannot be trained on."""
        from posttrain.data import processing
        from posttrain.data.pairs import faults, schema
        from posttrain.data.rows import as_dataset

        # As they are in the file, whose lines a data set does not know, but all with the same columns, as there
        columns = dict.fromkeys(name for name in faults.COLUMNS if name in self.columns)
        rows = ((place, columns | row) for place, row in zip(self.places, self.rows, strict=True))
        counts, warnings = faults.scan_pairs(rows, self.name)
        facts = {"empty": counts["empty"], "identical": counts["identical"], "notes": [], "warnings": warnings}
        if self.model is None:
            return facts | self._sizes([name for name in ("prompt", "chosen", "rejected") if name in self.columns])
        processing_class = self.processing_class()
        data = as_dataset(self.rows, self.name)
        stop_ids = processing.generation_stop_ids(self.model)
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
        """Measure the lengths of rows that are no preference pairs."""
        from posttrain.data import formats, tokens
        from posttrain.data.lengths import quantiles
        from posttrain.data.pairs import schema

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
        parts = {part: quantiles(faults) for part, faults in found.items()}
        longest = max(faults["99%"] for faults in parts.values())
        facts["notes"].append(f"max_length {longest} keeps 99% of the rows whole")
        facts["warnings"] += self.findings(processing_class)
        return facts | {"unit": "tokens", "lengths": parts}

    def _sizes(self, columns: list[str]) -> dict:
        from posttrain.data import formats
        from posttrain.data.lengths import quantiles

        unit, measure = "characters", characters
        if self.format.kind == formats.TOKENISED:
            unit, measure, columns = "tokens", len, formats.TOKEN_COLUMNS
        sizes = {name: [measure(row.get(name)) for row in self.rows] for name in columns}
        return {"unit": unit, "lengths": {name: quantiles(faults) for name, faults in sizes.items()}}


def characters(value) -> int:
    """Return the length of the texts in a value, of messages without their roles."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(characters(item) for name, item in value.items() if name not in ("role", "from", "type"))
    return sum(map(characters, value)) if isinstance(value, list) else 0


def print_json(report: dict) -> None:
    say_json(report, indent=1, default=str)
