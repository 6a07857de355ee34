"""What a run would do, told without doing it: no weight is loaded and nothing is written."""

import math
import os
import warnings

SAMPLE_ROWS = 64
# of the first row, which `show` prints as blocks
TEXTS = ("prompt", "chosen", "rejected", "completion", "reward", "demonstration", "gold")


def describe(
    model_id: str, args, train_dataset, peft_config=None, processes: int | None = None, eval_dataset=None
) -> dict:
    """Effective batch, steps, parameters, tokens and checkpoint size of a preference run, and one rendered pair.

    Settings and data are checked as the trainer would. The tokenizer is loaded, up to 64 rows are tokenised, and the
    model is built without memory for its weights.

    Args:
        model_id: a hub id or folder.
        args: the trainer's config.
        train_dataset: preference rows with a length.
        peft_config: the adapter, or None for full fine-tuning.
        processes: data parallel processes; default: those of this launch.
        eval_dataset: further rows to check, or None.

    Returns:
        plain values by name; token counts are means over the sample, cut at `max_length`.

    Raises:
        ConfigError, DataError, EnvironmentIssue: what the trainer would refuse before the model's weights load, and
            adapter settings that do not fit the model.
    """
    from posttrain.data import columns
    from posttrain.data.limits import Limits
    from posttrain.data.pairs import schema
    from posttrain.data.tokens import processing_class_for, tokenized_pairs, tokenizer_of
    from posttrain.run import checks
    from posttrain.trainers.preference import prepare

    config = check(model_id, args, peft_config)
    checks.check_model_config(args, config)
    processing_class = processing_class_for(model_id, None, args)
    train_dataset = columns.prepare(train_dataset, "train_dataset")
    eval_dataset = columns.prepare(eval_dataset, "eval_dataset")
    reports = schema.check_run(model_id, processing_class, args, train_dataset, eval_dataset, Limits(model_id, config))
    prepare.check_flip_rates(args, train_dataset, eval_dataset)

    processes = processes or args.world_size
    tokenizer = tokenizer_of(processing_class)
    limit = args.max_length or math.inf
    sample = train_dataset.select(range(min(SAMPLE_ROWS, len(train_dataset))))
    rows = list(tokenized_pairs(sample, processing_class))
    tokens = [min(len(r["prompt_ids"]) + len(r[side]), limit) for r in rows for side in ("chosen_ids", "rejected_ids")]

    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    lengths = reports["train_dataset"].lengths
    # of a large data set only a sample was looked at
    pairs = len(train_dataset) - (lengths.dropped if lengths and lengths.rows == len(train_dataset) else 0)
    # an epoch ends on a short step
    micro_batches = math.ceil(pairs / (args.per_device_train_batch_size * processes))
    steps_an_epoch = max(math.ceil(micro_batches / args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_an_epoch * args.num_train_epochs)
    first = rows[0]
    return {
        "processes": processes,
        "pairs per step": batch,
        "training pairs": pairs,
        "steps": steps,
        "tokens per step": round(2 * batch * sum(tokens) / len(tokens)),
        "longest sequence in the sample (tokens)": max(tokens),
        **sizes(config, args, peft_config),
        "prompt": tokenizer.decode(first["prompt_ids"]),
        "chosen": tokenizer.decode(first["chosen_ids"]),
        "rejected": tokenizer.decode(first["rejected_ids"]),
    }


def check(model_id: str, args, peft_config):
    """What every trainer checks before anything loads; returns the model's config."""
    from posttrain.run import checks, upstream_configs

    upstream_configs.check_args(args, type(args))
    checks.check_output_dir(args.output_dir)
    if peft_config is not None:
        checks.check_lora(peft_config)
    return checks.load_config(model_id, args)


def sizes(config, args, peft_config) -> dict[str, int]:
    """Parameters and checkpoint bytes of a model that is built without memory for its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from posttrain.run import checks

    with init_empty_weights(include_buffers=False), warnings.catch_warnings(), checks.upstream_refusals():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
        # without memory for the weights, shared ones come out apart
        model.tie_weights()
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable parameters": trainable,
        # fp32; AdamW keeps two numbers a parameter beside the weights
        "checkpoint bytes (estimate)": 4 * trainable * (1 if args.save_only_model else 3),
    }


def show(facts: dict) -> None:
    """Print what `describe` found, from the first process alone."""
    if os.environ.get("RANK", "0") != "0":
        return
    print("A dry run: nothing was trained and nothing was written.\n")
    for name, value in facts.items():
        if name in TEXTS:
            print(f"\nFirst {name}:\n{value}")
        else:
            print(f"{name:42} {value if isinstance(value, str) else format(value, ',')}")
