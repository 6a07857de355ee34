"""What a run would do, told without doing it: no weight is loaded and nothing is written."""

import math
import warnings

SAMPLE_ROWS = 64


def describe(model_id: str, args, train_dataset, peft_config=None, processes: int | None = None) -> dict:
    """Effective batch, steps, parameters, tokens and checkpoint size of a preference run, and one rendered pair.

    The tokenizer is loaded, up to 64 rows are tokenised, and the model is built without memory for its weights.

    Args:
        model_id: a hub id or folder.
        args: the trainer's config.
        train_dataset: preference rows with a length.
        peft_config: the adapter, or None for full fine-tuning.
        processes: data parallel processes; default: those of this launch.

    Returns:
        plain values by name; token counts are means over the sample, cut at `max_length`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from posttrain.evaluation import tokenized

    processes = processes or args.world_size
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    sample = tokenized(train_dataset.select(range(min(SAMPLE_ROWS, len(train_dataset)))), tokenizer)
    limit = args.max_length or math.inf
    rows = list(sample.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]))
    tokens = [min(len(r["prompt_ids"]) + len(r[side]), limit) for r in rows for side in ("chosen_ids", "rejected_ids")]

    config = AutoConfig.from_pretrained(model_id, trust_remote_code=args.trust_remote_code)
    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
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
    steps = args.max_steps if args.max_steps > 0 else math.ceil(len(train_dataset) / batch * args.num_train_epochs)
    first = rows[0]
    return {
        "processes": processes,
        "pairs per step": batch,
        "training pairs": len(train_dataset),
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
