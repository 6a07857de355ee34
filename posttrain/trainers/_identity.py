"""What makes two runs one: method, model, data and split of a run, and the settings its updates depend on."""

import json
from pathlib import Path

import xxhash

from posttrain.hub.base import adapter_config, base_name, loaded_from

# Columns of rows that were tokenised before the run
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids", "labels")
# Settings on which an update depends; the number of steps is not among them, as runs are made longer
_UPDATE = (
    "data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16",
    "train_sampling_strategy",
)  # fmt: skip


def fingerprint(dataset) -> str | None:
    """A digest of the tokens of a prepared dataset, in order; None for a stream."""
    tokens = [name for name in _TOKENS if name in (dataset.column_names or ())]
    columns = tokens and tokens + [name for name in ("flip_rate", "reward") if name in dataset.column_names]
    if not hasattr(dataset, "__len__"):
        return None
    if not columns:
        # not tokenised before the run: prompts for rollouts, with what rewards read
        digest = xxhash.xxh3_128(f"{len(dataset)}|{sorted(dataset.column_names)}".encode())
        for row in dataset:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()
    digest = xxhash.xxh3_128(f"{len(dataset)}|{columns}".encode())
    for batch in dataset.select_columns(columns).with_format("numpy").iter(1000):
        for name in columns:
            for value in batch[name]:
                digest.update(value.tobytes())
                digest.update(b"|")
    return digest.hexdigest()


def identity(trainer) -> dict:
    """What a run must share with the one it resumes, or else goes on with other numbers."""
    args, source, adapter = trainer.args, loaded_from(trainer.model), adapter_config(trainer.model)
    return {
        "method": type(trainer).__name__,
        # of a local folder its name alone, as it may lie elsewhere by the time the run goes on
        "model": base_name(source) or (Path(source).name if source else None),
        "adapter": f"{adapter.peft_type.value} r {getattr(adapter, 'r', None)}" if adapter else None,
        "data": fingerprint(trainer.train_dataset),
        "seed": args.seed,
        "world_size": trainer.accelerator.num_processes,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        **trainer.identity_settings(),
    }


def update_settings(trainer) -> dict:
    """What else a run must share with the checkpoint it goes on from; one that starts anew may change it."""
    adapter = adapter_config(trainer.model)
    shape = ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights") if adapter else ()
    settings = {name: plain(getattr(trainer.args, name)) for name in _UPDATE}
    return settings | {name: plain(getattr(adapter, name, None)) for name in shape}


def differing(now: dict, then: dict) -> str:
    """What of two identities differs, in words; empty if nothing does."""
    names = [name for name in sorted(now.keys() | then) if now.get(name) != then.get(name)]
    # digests of data say nothing to a reader
    words = {"data": "data: other rows there than here"}
    return "; ".join(words.get(name, f"{name}: {then.get(name)} there, {now.get(name)} here") for name in names)


def plain(value):
    """As JSON will hold it, an enumeration by its value."""
    return json.loads(json.dumps(getattr(value, "value", value), default=str))
