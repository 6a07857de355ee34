"""Checks of a data set before the model loads: its columns, its values, and what is left of it as tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from posttrain.data import formats, objects
from posttrain.data.formats import Format, convert, detect
from posttrain.data.lengths import Lengths, measure, said_of_prompts
from posttrain.data.pairs.faults import read_values, scan_pairs
from posttrain.data.processing import generation_stop_ids, processing_class_for, template_facts, tokenizer_of
from posttrain.data.rendering import row_checks
from posttrain.data.rendering.ends import check_ends
from posttrain.data.rows import refuse_splits
from posttrain.data.tokens import tokenized_pairs
from posttrain.errors import DataError
from posttrain.log import get_logger

__all__ = ["Format", "PairReport", "check_columns", "check_preferences", "check_run", "convert", "detect"]

# Rows whose tokens are looked at. One percent of them is 10 rows, enough for the advice on max_length.
SAMPLE = 1000


@dataclass
class PairReport:
    """What the checks found in preference pairs.

    Attributes:
        rows, empty, identical: pairs in all, with an empty side, and with equal sides.
        lengths: of the rows looked at as tokens: all of them, or a sample spread evenly over the data set. None if
            there are images.
        end_of_turn: the token that most answers end with; None if it is ordinary text.
        ended: share of the sides looked at that end with an end-of-turn token as they are trained, cut to max_length.
        prefix_preserving, stop_token_trained: what TRL's checks say of the chat template, None where it has none or
            cannot be asked. The second is about training on the assistant's tokens of whole conversations only.
        warnings: a sentence each. notes: what is only said.
    """

    name: str
    format: Format
    rows: int
    empty: int
    identical: int
    warnings: list[str]
    max_length: int | None = None
    lengths: Lengths | None = None
    end_of_turn: str | None = None
    ended: float = 0.0
    prefix_preserving: bool | None = None
    stop_token_trained: bool | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_sample(self) -> bool:
        """Whether the lengths are of a part of the rows."""
        return self.lengths is not None and self.lengths.rows < self.rows

    def summary(self) -> str:
        """Describe it in one line for the log."""
        parts = [f"{self.name}: {self.rows} pairs ({self.format})"]
        if self.lengths is not None:
            of = f" in {self.lengths.rows} of them" if self.is_sample else ""
            spans = (f"{part} {found['50%']} and {found['max']}" for part, found in self.lengths.parts.items())
            parts.append(f"median and longest{of}, in tokens: {', '.join(spans)}")
            if self.max_length is not None:
                parts.append(f"max_length {self.max_length} drops {self.lengths.dropped} and cuts {self.lengths.cut}")
            if self.end_of_turn is not None:
                kept = "" if self.ended == 1 else f", and {self.ended:.1%} keep it"
                parts.append(f"answers end with {self.end_of_turn!r}{kept}")
        return "; ".join(parts)

    def to_dict(self) -> dict:
        """Return plain values, for JSON."""
        values = asdict(self)
        if self.lengths is not None:
            for name in ("last_tokens", "trained_last_tokens", "cut_ends"):
                del values["lengths"][name]
        return values


def check_run(model, processing_class, args, train_dataset, eval_dataset=None, limits=None) -> dict[str, PairReport]:
    """Check every data set of a preference run, before its model loads.

    Args:
        model: a hub id or folder, or a model.
        processing_class: the tokenizer or processor; None to take the model's own.
        args: training arguments with max_length, truncation_mode, end_of_turn, model_init_kwargs, trust_remote_code.
        eval_dataset: a data set, several by name, or None.
        limits: what the model can take in, `posttrain.data.limits.Limits`; None to leave that out.

    Returns the reports by name; streams are not looked at. Raises as `check_preferences` does, and ConfigError for a
    model without a tokenizer.
    """
    refuse_splits(train_dataset)
    named = {"train_dataset": train_dataset}
    named.update(eval_dataset if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset})
    named = {name: dataset for name, dataset in named.items() if hasattr(dataset, "column_names")}
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    revision = kwargs.get("revision") if isinstance(model, str) else None
    stop_ids = generation_stop_ids(model, revision)
    if any(map(_is_sized, named.values())):
        processing_class = processing_class_for(model, processing_class, args)
    # TRL's own config has no such field
    end_of_turn = getattr(args, "end_of_turn", "warn")
    reports = {
        name: check_preferences(
            dataset, processing_class, args.max_length, name, args.truncation_mode, stop_ids, end_of_turn
        )
        for name, dataset in named.items()
    }
    reports = {name: report for name, report in reports.items() if report is not None}
    if limits is not None:
        limits.check_reports(reports, named, processing_class, args.max_length)
    return reports


def check_preferences(
    dataset,
    processing_class,
    max_length: int | None = None,
    name: str = "train_dataset",
    truncation_mode: str = "keep_start",
    stop_ids: Iterable[int] = (),
    end_of_turn: str = "warn",
) -> PairReport | None:
    """Examine as `examine_preferences` does, and say in the log what was found: a line, and one for each warning.

    Of a stream nothing is looked at, and None is returned.
    """
    if not _is_sized(dataset):
        get_logger().info("%s: a stream; its rows are not checked before they come up", name)
        return None
    report = examine_preferences(
        dataset, processing_class, max_length, name, truncation_mode, stop_ids, end_of_turn=end_of_turn
    )
    get_logger().info("%s", report.summary())
    for note in report.notes:
        get_logger().info("%s", note)
    for warning in report.warnings:
        get_logger().warning("%s", warning)
    return report


def examine_preferences(
    dataset,
    processing_class,
    max_length: int | None = None,
    name: str = "the data set",
    truncation_mode: str = "keep_start",
    stop_ids: Iterable[int] = (),
    places: Sequence[str] = (),
    end_of_turn: str = "warn",
) -> PairReport:
    """Find what would make training on these pairs fail, or teach nothing.

    Args:
        dataset: a `datasets.Dataset` of preference pairs, tokenised or not.
        processing_class: the tokenizer, or the processor.
        max_length: tokens of prompt and answer together, None for no limit. truncation_mode: TRL's.
        name: of the data set, for messages.
        stop_ids: token ids that end generation. Default: the tokenizer's eos.
        places: where each row is, for messages. Default: its number, from 1.
        end_of_turn: `warn` where answers do not end the turn, or `require` that half of them do.

    Raises:
        DataError: no rows; missing columns; a value of the wrong type, with its row; every pair with an empty side or
            identical ones; every row dropped; with `require`, answers that do not end the turn.
        ConfigError: a tokenizer that lacks a chat template or an eos token, where the rows need it.
    """
    if len(dataset) == 0:
        raise DataError(f"{name} holds no rows.")
    dataset = objects.restored(dataset.with_format(None))
    images = sorted({"image", "images"} & set(dataset.column_names))
    dataset = dataset.remove_columns(images)
    found = check_columns(dataset.column_names, name, dataset[0])
    places = places or [f"{name}, row {number}" for number in range(1, len(dataset) + 1)]
    counts, warnings = scan_pairs(zip(places, read_values(dataset), strict=True), name)
    report = PairReport(name, found, len(dataset), counts["empty"], counts["identical"], warnings, max_length)
    if images:
        warnings.append(f"{name} has images, so its lengths in tokens were not checked.")
    else:
        checked = row_checks.check(dataset, processing_class, name, places, "pairs")
        warnings += checked.warnings
        report.notes += checked.notes
        _check_lengths(report, dataset, places, processing_class, truncation_mode == "keep_start")
        ends = check_ends(
            name, report.lengths, max_length, tokenizer_of(processing_class), stop_ids, end_of_turn,
            is_tokenised=found.kind == formats.TOKENISED,
        )  # fmt: skip
        report.ended, report.end_of_turn = ends.ended, ends.end_of_turn
        warnings += ends.warnings
        if found.style == "conversational":
            facts = template_facts(processing_class)
            report.prefix_preserving, report.stop_token_trained = facts.values()
    return report


def check_columns(columns: Sequence[str], name: str, row: Mapping | None = None) -> Format:
    """Return the format of preference pairs.

    DataError with the found and needed columns and a fix for anything else.
    """
    found = detect(columns, row)
    if found.kind in formats.PAIR_KINDS:
        return found
    if found.kind in formats.CONVERTED_PAIRS:
        raise DataError(
            f"{name} holds {found.kind} rows ({found.why}), which must be converted first:\n"
            "  from posttrain.data.formats import convert\n"
            "  dataset = convert(dataset)"
        )
    raise formats.without_sides(columns, name, row, is_loaded=True)


def _is_sized(dataset) -> bool:
    return hasattr(dataset, "__len__")


def _check_lengths(report: PairReport, dataset, places: Sequence[str], processing_class, keep_start: bool) -> None:
    rows, name, limit = len(dataset), report.name, report.max_length
    indices = range(rows) if rows <= SAMPLE else [i * rows // SAMPLE for i in range(SAMPLE)]
    sample = dataset if len(indices) == rows else dataset.select(indices)
    found_at = [places[index] for index in indices]
    lengths = report.lengths = measure(sample, processing_class, found_at, limit, keep_start)
    looked_at = f"{lengths.rows} rows looked at" if report.is_sample else f"{rows} rows"
    advice = f"max_length {lengths.keeps_99} keeps 99% of the rows, {lengths.whole_99} keeps 99% of them whole"
    if lengths.dropped == lengths.rows and (
        not report.is_sample or _all_dropped(dataset, places, processing_class, limit)
    ):
        raise DataError(
            f"{name}: max_length is {limit}, and every prompt alone is that long ({lengths.shortest_prompt} to "
            f"{lengths.parts['prompt']['max']} tokens), so no row would be left to train on; {advice}."
        )
    if lengths.equal and lengths.dropped + lengths.equal == lengths.rows:
        if not lengths.equal_when_cut:
            raise DataError(
                f"{name}: in all {looked_at}, the two sides are the same tokens, though not the same texts: they "
                "differ only in what the chat template or the tokenizer leaves out (most trim the blanks around a "
                "message). Leave those rows out, or use a template that keeps the difference."
            )
        raise DataError(
            f"{name}: in all {looked_at}, the two sides are the same tokens as far as max_length {limit} lets them "
            f"through. {advice}."
        )
    if lengths.dropped:
        report.warnings.append(
            f"{name}: max_length {limit} drops {lengths.dropped} of {looked_at}, whose prompt alone is that long; "
            f"{advice}."
        )
    if lengths.cut and not keep_start:
        report.warnings.append(
            f"{name}: max_length {limit} with truncation_mode keep_end cuts the beginning of {lengths.cut} of "
            f"{looked_at}: the model sees a part of their prompt, or nothing of it; {advice}."
        )
    if lengths.equal_when_cut:
        report.warnings.append(
            f"{name}: max_length {limit} cuts {lengths.equal_when_cut} of {looked_at} to sides that are the same; they "
            "teach nothing."
        )
    prompts = said_of_prompts(lengths, name)
    if prompts:
        report.warnings.append(prompts)


def _all_dropped(dataset, places: Sequence[str], processing_class, limit: int) -> bool:
    return all(len(row["prompt_ids"]) >= limit for row in tokenized_pairs(dataset, processing_class, places))
