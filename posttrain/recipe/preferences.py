"""What the recipe of preference training adds to every recipe's own: its pairs, and a run told without doing it."""

import functools
import itertools

from posttrain import recipe
from posttrain.config import DataArguments
from posttrain.recipe.dry_run import SAMPLE_ROWS, check, sizes


def load(data_args: DataArguments, training_args, privacy=None):
    """Load the pairs to train on, and those for evaluation if some are named or `eval_strategy` asks for them.

    `privacy`: a `PrivacyConfig`, whose column of units is kept beside the pairs, or None. Raises ConfigError where the
    trainer would refuse the settings beside it.
    """
    from posttrain.data.pairs.loading import load_preferences
    from posttrain.run.private_settings import columns_beside

    if privacy is not None:
        training_args.as_private(privacy)
    load = functools.partial(load_preferences, beside=columns_beside(privacy))
    return recipe.load_splits(load, data_args, training_args.eval_strategy != "no", training_args.seed)


def describe(
    model_id: str,
    args,
    train_dataset,
    peft_config=None,
    processes: int | None = None,
    eval_dataset=None,
    privacy=None,
) -> dict:
    """Describe a preference run: effective batch, steps, parameters, tokens, checkpoint size, and one rendered pair.

    Settings and data are checked as the trainer would. The tokenizer is loaded, the first 64 pairs that `max_length`
    keeps are tokenised, and the model is built without memory for its weights.

    Args:
        model_id: a hub id or folder.
        args: the trainer's config.
        train_dataset: preference rows with a length.
        peft_config: the adapter, or None for full fine-tuning.
        processes: data parallel processes; default: those of this launch, which a private run always has.
        eval_dataset: further rows to check, or None.
        privacy: the settings of a private run, or None; its units, noise, steps and epsilon are told as well.

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

    args = args if privacy is None else args.as_private(privacy)
    config = check(model_id, args, peft_config, live_reference=True)
    processing_class = processing_class_for(model_id, None, args)
    ready = prepare.prepare(model_id, args, config, processing_class, train_dataset, eval_dataset)
    processes = processes or args.world_size
    tokenizer = tokenizer_of(processing_class)
    pairs, limit = tokenized_pairs(ready.train_dataset, processing_class), prepare.prompt_limit(args)
    kept = ((place, pair) for place, pair in enumerate(pairs) if limit is None or len(pair["prompt_ids"]) < limit)
    sample = list(itertools.islice(kept, SAMPLE_ROWS))
    rows, total, trained = [pair for _, pair in sample], ready.rows, ready.train_dataset
    if total is None or (privacy is not None and total < len(trained)):
        places = [place for place, _ in itertools.chain(sample, kept)]
        total, trained = len(places), trained.select(places)
    check_fills_a_batch(args, total)
    tokens = [len(row["prompt_ids"]) + len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    if args.max_length is not None:
        tokens = [min(length, args.max_length) for length in tokens]

    if privacy is not None:
        in_steps, a_step = _drawn(args, trained, ready.plan)
    else:
        a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        in_steps = {
            "pairs per step": a_step, "training pairs": total,
            "steps": steps(args, micro_batches(args, total, processes)),
        }  # fmt: skip
    first = rows[0]
    return {
        "processes": processes,
        **in_steps,
        "tokens per step": round(2 * a_step * sum(tokens) / len(tokens)),
        "longest sequence in the sample (tokens)": max(tokens),
        **sizes(config, args, peft_config),
        "prompt": tokenizer.decode(first["prompt_ids"]),
        "chosen": tokenizer.decode(first["chosen_ids"]),
        "rejected": tokenizer.decode(first["rejected_ids"]),
    }


def _drawn(args, trained, plan) -> tuple[dict, float]:
    """Return what there is to tell of a private run's steps, and the pairs of one on average.

    `args`: the config, which follows the plan. `trained`: pairs that are trained on. `plan`: of all that were given.
    """
    from posttrain.run import private_settings

    plan, privacy = private_settings.planned_anew(args, trained, plan), args.privacy
    private_settings.follow(args, plan)
    most = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    taken = [min(len(rows), privacy.rows_per_unit) for rows in private_settings.units_of(privacy, trained)]
    told = {"most pairs per step": most, "training pairs": len(trained), "steps": plan.steps, **plan.told()}
    return told, privacy.expected_batch_size * sum(taken) / len(taken)
