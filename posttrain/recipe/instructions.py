"""What the recipes of supervised fine-tuning share: their rows, and a run told without doing it."""

import copy
import functools

from posttrain import recipe
from posttrain.config import DataArguments
from posttrain.recipe import dry_run


def load(data_args: DataArguments, training_args):
    """Load the rows to train on, and those for evaluation if some are named or `eval_strategy` asks for them."""
    from posttrain.data.instructions.loading import load_instructions
    from posttrain.run.private_settings import columns_beside

    load = functools.partial(load_instructions, beside=columns_beside(training_args.privacy))
    return recipe.load_splits(load, data_args, training_args.eval_strategy != "no", training_args.seed)


def describe(model_id: str, args, train_dataset, peft_config=None, eval_dataset=None) -> dict:
    """Tell rows, steps, parameters, tokens and checkpoint size of a run, and its first row as it is learned.

    Settings and data are checked as the trainer would. The tokenizer is loaded, every row is tokenised, and the model
    is built without memory for its weights.

    Raises:
        ConfigError, DataError, EnvironmentIssue: what the trainer would refuse before the model's weights load, and
            adapter settings that do not fit the model.
    """
    from posttrain.data.instructions.tokens import learned_ends, tokenised_before_loading
    from posttrain.data.processing import processing_class_for, tokenizer_of
    from posttrain.run import private_settings
    from posttrain.run.prepared import micro_batches, steps
    from posttrain.trainers.sft import prepare

    config = dry_run.check(model_id, args, peft_config)
    processing_class = processing_class_for(model_id, None, args)
    ready = prepare.prepare(model_id, args, config, processing_class, train_dataset, eval_dataset, peft_config)
    facts, args = {"processes": args.world_size, "training rows": len(train_dataset)}, copy.copy(args)
    private_settings.follow(args, ready.plan)
    later = "known once the model is loaded (chat_template_path or eos_token change the tokens)"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    most = {"most rows per step" if args.privacy else "rows per step": batch}
    if ready.plan is None and args.known_later:
        most = {"most rows per step": later}
    if not tokenised_before_loading(args):
        facts |= {"of them within max_length": later} | most
        return facts | dry_run.sizes(config, args, peft_config)
    rows, part = ready.train_dataset, prepare.kept_part(args)
    cut = ((row["input_ids"][part], row["labels"][part]) for row in rows)
    # a row of which nothing is left to learn is dropped
    learned = ((ids, labels) for ids, labels in cut if any(label != -100 for label in labels))
    first = next(learned)
    if args.packing:
        packed = prepare.packed(rows, args)
        kept = facts["rows packed into"] = len(packed)
        trained = list(zip(packed["input_ids"], packed["labels"], strict=True))
    else:
        kept = facts["of them within max_length"] = ready.rows
        trained = [first, *learned]
    lengths = [len(ids) for ids, _ in trained]
    count = sum(label != -100 for _, labels in trained for label in labels)
    (ids, labels), tokenizer = first, tokenizer_of(processing_class)
    start, end = learned_ends(labels)
    return {
        **facts,
        **most,
        "steps": ready.plan.steps if ready.plan else steps(args, micro_batches(args, kept)),
        **(ready.plan.told() if ready.plan else {}),
        "longest row (tokens)": max(lengths),
        "share of tokens that are learned": f"{count / sum(lengths):.1%}",
        **dry_run.sizes(config, args, peft_config),
        "prompt": tokenizer.decode(ids[:start]),
        "completion": tokenizer.decode(ids[start:end]),
    }
