"""A preference run, told without doing it."""

import itertools

from posttrain.recipe.dry_run import SAMPLE_ROWS, check, sizes


def describe(
    model_id: str, args, train_dataset, peft_config=None, processes: int | None = None, eval_dataset=None
) -> dict:
    """Describe a preference run: effective batch, steps, parameters, tokens, checkpoint size, and one rendered pair.

    Settings and data are checked as the trainer would. The tokenizer is loaded, the first 64 pairs that `max_length`
    keeps are tokenised, and the model is built without memory for its weights.

    Args:
        model_id: a hub id or folder.
        args: the trainer's config.
        train_dataset: preference rows with a length.
        peft_config: the adapter, or None for full fine-tuning.
        processes: data parallel processes; default: those of this launch.
        eval_dataset: further rows to check, or None.

    Returns:
        plain values by name; token counts are means over the sample, cut at `max_length`. The pair is the first that
        is trained on, whole.

    Raises:
        ConfigError, DataError, EnvironmentIssue: what the trainer would refuse before the model's weights load, and
            adapter settings that do not fit the model.
    """
    from posttrain.data.processing import processing_class_for, tokenizer_of
    from posttrain.data.tokens import tokenized_pairs
    from posttrain.run.prepared import check_fills_a_batch, micro_batches, steps
    from posttrain.trainers.preference import prepare

    config = check(model_id, args, peft_config, live_reference=True)
    processing_class = processing_class_for(model_id, None, args)
    ready = prepare.prepare(model_id, args, config, processing_class, train_dataset, eval_dataset)
    processes = processes or args.world_size
    tokenizer = tokenizer_of(processing_class)
    pairs, limit = tokenized_pairs(ready.train_dataset, processing_class), prepare.prompt_limit(args)
    kept = (pair for pair in pairs if limit is None or len(pair["prompt_ids"]) < limit)
    rows = list(itertools.islice(kept, SAMPLE_ROWS))
    total = ready.rows if ready.rows is not None else len(rows) + sum(1 for _ in kept)
    check_fills_a_batch(args, total)
    tokens = [len(row["prompt_ids"]) + len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    if args.max_length is not None:
        tokens = [min(length, args.max_length) for length in tokens]

    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    first = rows[0]
    return {
        "processes": processes,
        "pairs per step": batch,
        "training pairs": total,
        "steps": steps(args, micro_batches(args, total, processes)),
        "tokens per step": round(2 * batch * sum(tokens) / len(tokens)),
        "longest sequence in the sample (tokens)": max(tokens),
        **sizes(config, args, peft_config),
        "prompt": tokenizer.decode(first["prompt_ids"]),
        "chosen": tokenizer.decode(first["chosen_ids"]),
        "rejected": tokenizer.decode(first["rejected_ids"]),
    }
