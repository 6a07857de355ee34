"""What a run would do, told without doing it: no weight is loaded and nothing is written."""

import math
import warnings

SAMPLE_ROWS = 64


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
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from posttrain.data import schema
    from posttrain.data.tokens import load_processing_class, tokenized_pairs, tokenizer_of
    from posttrain.trainers import _checks

    _checks.check_args(args, type(args))
    _checks.check_output_dir(args.output_dir)
    if peft_config is not None:
        _checks.check_lora(peft_config)
    config = _checks.load_config(model_id, args)
    _checks.check_model_config(args, config)
    revision = (args.model_init_kwargs or {}).get("revision")
    processing_class = load_processing_class(model_id, revision, args.trust_remote_code)
    reports = schema.check_run(model_id, processing_class, args, train_dataset, eval_dataset)
    _checks.check_flip_rates(args, train_dataset, eval_dataset)

    processes = processes or args.world_size
    tokenizer = tokenizer_of(processing_class)
    limit = args.max_length or math.inf
    sample = train_dataset.select(range(min(SAMPLE_ROWS, len(train_dataset))))
    rows = list(tokenized_pairs(sample, processing_class))
    tokens = [min(len(r["prompt_ids"]) + len(r[side]), limit) for r in rows for side in ("chosen_ids", "rejected_ids")]

    with init_empty_weights(include_buffers=False), warnings.catch_warnings(), _checks.upstream_refusals():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
        # without memory for the weights, shared ones come out apart
        model.tie_weights()
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

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
        "parameters": parameters,
        "trainable parameters": trainable,
        "tokens per step": round(2 * batch * sum(tokens) / len(tokens)),
        "longest sequence in the sample (tokens)": max(tokens),
        # fp32; AdamW keeps two numbers a parameter beside the weights
        "checkpoint bytes (estimate)": 4 * trainable * (1 if args.save_only_model else 3),
        "prompt": tokenizer.decode(first["prompt_ids"]),
        "chosen": tokenizer.decode(first["chosen_ids"]),
        "rejected": tokenizer.decode(first["rejected_ids"]),
    }


def show(facts: dict) -> None:
    """Print what `describe` found."""
    print("A dry run: nothing was trained and nothing was written.\n")
    for name, value in facts.items():
        if name in ("prompt", "chosen", "rejected"):
            print(f"\nFirst {'pair, its prompt' if name == 'prompt' else name}:\n{value}")
        else:
            print(f"{name:42} {value:,}")
