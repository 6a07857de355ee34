"""What a run on instructions needs before any weights are there: settings and rows checked, rows as tokens."""

from collections import Counter

from posttrain.data import columns, formats, objects, rows
from posttrain.data.instructions import loading
from posttrain.data.instructions.tokens import as_trained, learned_ends, tokenised_before_loading
from posttrain.data.lengths import Lengths, last_token, quantiles
from posttrain.data.limits import Limits
from posttrain.data.processing import generation_stop_ids, processing_class_for, tokenizer_of
from posttrain.data.rendering import row_checks
from posttrain.data.rendering.ends import check_ends
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger
from posttrain.run import evaluation, private_settings
from posttrain.run.prepared import Prepared, check_fills_a_batch

READ = (*loading.COLUMNS, "label", "input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths")


def prepare(model, args, config, processing_class, train_dataset, eval_dataset, peft_config=None) -> Prepared:
    """Check settings and rows as far as that needs no weights; tokenise them as `trl.SFTTrainer` does.

    Args:
        model: its name, or the model itself. config: the model's.
        processing_class: a tokenizer or processor, or None for the model's own.
        train_dataset: rows of prompt and completion, messages or texts, tokenised rows, or a stream of any.
        eval_dataset: likewise, several by name, or None. peft_config: of a new adapter, or None.

    Raises:
        ConfigError, DataError, EnvironmentIssue: settings, rows or a tokenizer that cannot be trained with.
    """
    if train_dataset is None:
        raise ConfigError("train_dataset is missing; give a datasets.Dataset of prompt and completion, or messages.")
    rows.refuse_splits(train_dataset)
    evaluation.check_sets(args, eval_dataset)
    args.check_model(model, config, peft_config, eval_dataset)
    processing_class = processing_class_for(model, processing_class, args)
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    stop_ids = generation_stop_ids(model, revision)
    limits = Limits(model, config)
    named = {"train_dataset": train_dataset, **rows.by_name(eval_dataset)}
    left = {}
    for name, dataset in named.items():
        named[name], left[name] = ready(dataset, processing_class, args, name, limits, stop_ids)
    train_dataset, known = named.pop("train_dataset"), left["train_dataset"]
    if args.packing and args.dataloader_drop_last and "input_ids" in objects.names_of(train_dataset):
        check_fills_a_batch(args, len(packed(train_dataset, args)) if hasattr(train_dataset, "__len__") else None)
    elif not args.packing:
        check_fills_a_batch(args, known)
    plan = None
    if args.privacy is not None and (known is not None or not hasattr(train_dataset, "__len__")):
        plan = private_settings.planned(args, learnable(train_dataset, args, known))
    eval_dataset = rows.as_given(eval_dataset, named)
    return Prepared(train_dataset, eval_dataset, limits, None if args.packing else known, plan=plan)


def ready(dataset, processing_class, args, name: str, limits, stop_ids=()):
    """Return a data set checked and, where the model changes nothing, tokenised; and how many rows TRL will keep.

    Of a stream nothing is looked at, and the number is None; so it is where tokens are known once the model is there.
    """
    names = objects.names_of(dataset)
    images = sorted({"image", "images"} & set(names))
    if images:
        raise DataError(f"{name} has the column {images[0]}; this trainer learns from texts. Use trl.SFTTrainer.")
    if not hasattr(dataset, "__len__"):
        get_logger().info("%s: a stream; its rows are not checked before they come up", name)
        return dataset, None
    if len(dataset) == 0:
        raise DataError(f"{name} holds no rows.")
    if "input_ids" not in names:
        dataset = objects.restored(columns.prepare(dataset, name, READ))
        row = dataset[0]
        parts = loading.parts_of(dataset.column_names, row, name, is_loaded=True)
        places = [f"{name}, row {number}" for number in range(1, len(dataset) + 1)]
        loading.check_rows(dataset.with_format(None).select_columns(list(parts)), places, parts)
        template = check_template(row[parts[-1]], processing_class, args)
        row_checks.report(dataset, processing_class, name, places)
        if not tokenised_before_loading(args):
            return dataset, None
        completion_only = args.completion_only_loss
        completion_only = parts[0] == "prompt" if completion_only is None else completion_only
        dataset = as_trained(dataset, processing_class, args, name, completion_only, args.assistant_only_loss, template)
    limits.check_tokenizer(processing_class)
    limits.check(dataset, (("input_ids",),), processing_class, name, args.max_length)
    if "labels" not in dataset.column_names:
        return dataset, None
    return dataset, check_lengths(dataset, processing_class, args, name, stop_ids)


def packed(dataset, args):
    """Return tokenised rows packed to `max_length` as `trl.SFTTrainer` packs them."""
    from trl import pack_dataset

    dataset = dataset.select_columns([name for name in ("input_ids", "labels") if name in dataset.column_names])
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    return pack_dataset(dataset, args.max_length, args.packing_strategy, {})


def learnable(dataset, args, known: int | None):
    """Return the rows of a tokenised data set of which `max_length` leaves something to learn; `known`: how many."""
    if known is None or known == len(dataset):
        return dataset
    part = kept_part(args)
    labels = (labels[part] for labels in dataset["labels"])
    return dataset.select([row for row, left in enumerate(labels) if any(label != -100 for label in left)])


def kept_part(args) -> slice:
    """Return the part of a row's tokens that `max_length` leaves; packing to it may split rows instead."""
    if args.max_length is None or (args.packing and args.packing_strategy != "bfd"):
        return slice(None)
    # packing cuts at the end, whatever the mode
    if args.packing or args.truncation_mode == "keep_start":
        return slice(args.max_length)
    return slice(-args.max_length, None)


def check_template(value, processing_class, args) -> str | None:
    """Return the chat template that TRL takes in the place of the tokenizer's; refuse rows that cannot be rendered."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = getattr(processing_class, "chat_template", None)
    if not formats.is_messages(value):
        if args.assistant_only_loss:
            raise ConfigError(
                "assistant_only_loss is true, and the rows are texts, in which nobody speaks. Give them as messages, "
                "or leave it out."
            )
        if tokenizer_of(processing_class).eos_token is None and args.eos_token is None:
            raise ConfigError("the tokenizer has no eos_token to end a text with; set `tokenizer.eos_token`.")
        return None
    if not template and args.chat_template_path is None:
        raise ConfigError(
            "the rows are conversational, and the tokenizer has no chat template to render them with. Use an instruct "
            "model, set `chat_template_path`, or give the rows as texts."
        )
    if not args.assistant_only_loss or args.chat_template_path is not None or has_generation_markers(template):
        return None
    try:
        return get_training_chat_template(processing_class)
    except ValueError:
        raise ConfigError(
            "assistant_only_loss is true, and the chat template does not mark the assistant's words with "
            "`{% generation %}`. Set `chat_template_path` to one that does, or leave assistant_only_loss out."
        ) from None


def check_lengths(dataset, processing_class, args, name: str, stop_ids=()) -> int:
    """Say what `max_length` cuts and how rows end; return how many rows something is left to learn of.

    Raises DataError where that is none.
    """
    tokenizer, limit, blanks = tokenizer_of(processing_class), args.max_length, {}
    cuts = limit is not None and not (args.packing and args.packing_strategy != "bfd")
    found = Lengths(len(dataset))
    ends, trained, cut_ends = Counter(), Counter(), Counter()
    lengths, starts, kept = [], [], 0
    for ids, labels in zip(dataset["input_ids"], dataset["labels"], strict=True):
        first, last = learned_ends(labels)
        lengths.append(len(ids))
        starts.append(first)
        end = last_token(ids[first:last], tokenizer, blanks)
        ends[end] += 1
        low, high = 0, len(ids)
        if cuts and len(ids) > limit:
            found.cut += 1
            low, high = (0, limit) if args.truncation_mode == "keep_start" else (len(ids) - limit, len(ids))
        if not any(label != -100 for label in labels[low:high]):
            found.dropped += 1
            continue
        kept += 1
        there = last_token(ids[max(first, low) : min(last, high)], tokenizer, blanks)
        trained[there] += 1
        cut_ends[end] += there != end
    found.last_tokens, found.trained_last_tokens, found.cut_ends = dict(ends), dict(trained), dict(cut_ends)
    found.whole_99, found.longest = quantiles(lengths)["99%"], max(lengths)
    advice = (
        f"max_length {quantiles(starts)['99%'] + 1} keeps 99% of the rows, {found.whole_99} keeps 99% of them whole"
    )
    if not kept:
        raise DataError(
            f"{name}: no row has a token that would be learned (max_length is {limit}, rows have {min(lengths)} to "
            f"{max(lengths)} tokens); {advice}."
        )
    if found.cut or found.dropped:
        get_logger().warning(
            "%s: of %d rows, max_length %s cuts %d and leaves nothing to learn of %d; %s.",
            name, len(dataset), limit, found.cut, found.dropped, advice,
        )  # fmt: skip
    for warning in check_ends(name, found, limit, tokenizer, stop_ids, args.end_of_turn).warnings:
        get_logger().warning("%s", warning)
    return kept
