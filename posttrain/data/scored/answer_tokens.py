"""Scored answers as tokens before anything is weighed: whether they end their turn, and what `max_length` leaves."""

from posttrain.data import formats
from posttrain.data.instructions.tokens import as_trained
from posttrain.data.lengths import measure, quantiles, said_of_prompts
from posttrain.data.processing import tokenizer_of
from posttrain.data.rendering import row_checks
from posttrain.data.rendering.ends import check_ends
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger

# Rows of which the end of the answer is looked at
SAMPLE = 1000


def drop_overlong(dataset, processing_class, args, name: str, stop_ids=()):
    """Tokenise every row as `trl.SFTTrainer` does, and leave out those of which `max_length` leaves no answer.

    Answers' ends are checked on up to 1000 rows. `args`: an SFTConfig. Logs what is lost and cut.

    Returns the rows left, tokenised but not cut, and a sentence about the others for errors, empty where there are
    none.

    Raises DataError where nothing is left, with `end_of_turn: require` where answers do not end the turn, and where a
    row cannot be rendered; ConfigError for a tokenizer without chat template or eos token.
    """
    check_template(dataset, processing_class)
    _check_sample(dataset, processing_class, args, name, stop_ids)
    places = [f"{name}, answer {number}" for number in range(1, len(dataset) + 1)]
    row_checks.report(dataset, processing_class, name, places, "answers")
    dataset = tokenise(dataset, processing_class, args, name)
    starts, lengths = [], []
    for labels in dataset["labels"]:
        starts.append(next((i for i, label in enumerate(labels) if label != -100), len(labels)))
        lengths.append(len(labels))
    limit = args.max_length
    if limit is None:
        return dataset, ""
    kept = [i for i, start in enumerate(starts) if start < limit or args.truncation_mode != "keep_start"]
    lost, cut = len(starts) - len(kept), sum(lengths[i] > limit for i in kept)
    advice = (
        f"max_length {quantiles(starts)['99%'] + 1} keeps 99% of the rows, {quantiles(lengths)['99%']} keeps 99% of "
        "them whole"
    )
    if not kept:
        raise DataError(
            f"{name}: max_length is {limit}, and every prompt is that long ({min(starts)} to {max(starts)} tokens), so "
            f"no answer would be left to learn from; {advice}."
        )
    if lost or cut:
        left_out = f"leaves nothing of {lost} answers, which are left out and count nowhere, and " if lost else ""
        get_logger().warning(
            "%s: of %d rows, max_length %s %scuts %d; %s.", name, len(starts), limit, left_out, cut, advice
        )
    if not lost:
        return dataset, ""
    note = (
        f" max_length {limit} leaves nothing of {lost} further answers, whose prompts alone are that long; "
        f"max_length {max(starts) + 1} keeps a token of each, {max(lengths)} all of them whole."
    )
    return dataset.select(kept), note


def tokenise(dataset, processing_class, args, name: str):
    """Return the columns input_ids and labels beside the others, nothing cut.

    Raises DataError for what cannot be rendered.
    """
    return as_trained(dataset, processing_class, args, name, completion_only=True)


def check_template(dataset, processing_class) -> None:
    """Refuse messages where the tokenizer has no chat template."""
    if formats.is_messages(dataset[0]["completion"]) and not processing_class.chat_template:
        raise ConfigError(
            "the rows are conversational, and the tokenizer has no chat template to render them with. Use an instruct "
            "model, set `tokenizer.chat_template`, or give prompt and completion (or prompt, chosen and rejected of "
            "pairs with rewards) as texts."
        )


def _check_sample(dataset, processing_class, args, name: str, stop_ids) -> None:
    rows = len(dataset)
    sample = dataset if rows <= SAMPLE else dataset.select([i * rows // SAMPLE for i in range(SAMPLE)])
    places = [f"{name}, answer {i * rows // len(sample) + 1}" for i in range(len(sample))]
    # both sides of a pair, as the pairs' tokeniser takes them
    columns = [column for column in ("prompt", "tools", "chat_template_kwargs") if column in sample.column_names]
    pairs = sample.select_columns([*columns, "completion"]).rename_column("completion", "chosen")
    pairs = pairs.add_column("rejected", sample["completion"][:])
    lengths = measure(pairs, processing_class, places, args.max_length, args.truncation_mode == "keep_start")
    end_of_turn = getattr(args, "end_of_turn", "warn")
    ends = check_ends(name, lengths, args.max_length, tokenizer_of(processing_class), stop_ids, end_of_turn)
    prompts = said_of_prompts(lengths, name)
    for warning in [*ends.warnings, *([prompts] if prompts else ())]:
        get_logger().warning("%s", warning)
