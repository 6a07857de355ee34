"""What makes two runs one: method, model, data and split of a run, and the settings its updates depend on."""

import itertools
import json
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

import xxhash
from transformers import TrainingArguments

from posttrain.config.setting import defaults_of, identity_of, meanings
from posttrain.hub.base_model import NOT_THE_ADAPTER, adapter_config, base_name, loaded_from
from posttrain.mechanisms.base_digests import base_digests, plain, quantisation
from posttrain.private import without_secrets
from posttrain.run import optimizer_args
from posttrain.visible import one_line

# Columns of rows that were tokenised before the run
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids", "labels")
# Settings of transformers on which an update depends; the number of steps is not among them, as runs are made longer
_UPDATE = (
    "data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16",
    "train_sampling_strategy", "optim_target_modules", "label_smoothing_factor", "average_tokens_across_devices",
    "neftune_noise_alpha", "dataloader_drop_last",
)  # fmt: skip
# Settings of accelerate on which the order of rows hangs
_ORDER = ("use_seedable_sampler", "split_batches", "dispatch_batches", "even_batches")
# Settings of TRL on which no update depends, or that the rows' tokens and the model tell better: all others are the
# run's, those of releases to come among them
_ASIDE = {
    "model_init_kwargs", "trust_remote_code", "dataset_num_proc", "dataset_text_field", "dataset_kwargs",
    "chat_template_path", "eos_token", "pad_token", "pad_to_multiple_of", "padding_free",
    "activation_offloading", "precompute_ref_log_probs", "precompute_ref_batch_size", "eval_packing",
    "generation_batch_size", "num_generations_eval", "cache_implementation", "ds3_gather_for_generation",
    "num_completions_to_print", "use_vllm", "vllm_importance_sampling_cap",
}  # fmt: skip
_ASIDE_BY_PREFIX = ("log_", "vllm_", "use_transformers_", "transformers_")
_BUT_NOT = ("vllm_importance_sampling", "vllm_structured_outputs")


def fingerprint(dataset, read: Collection[str] = ()) -> str | None:
    """Digest the rows of a prepared data set, in order; None for a stream.

    Of tokenised rows the tokens count and, of the columns of `read`, those that reach a batch beside them.
    """
    tokens = [name for name in _TOKENS if name in (dataset.column_names or ())]
    known = ("flip_rate", "reward")
    others = [name for name in known if name in (dataset.column_names or ())]
    others += sorted(set(read) & set(dataset.column_names or ()) - {*tokens, *others})
    columns = tokens and tokens + others
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
                # a list of lists comes as objects
                digest.update(value.tobytes() if value.dtype != object else repr(value.tolist()).encode())
                digest.update(b"|")
    return digest.hexdigest()


def identity(trainer) -> dict:
    """Return what a run must share with the one it resumes, so that it goes on with the same numbers."""
    args, source, adapter = trainer.args, loaded_from(trainer.model), adapter_config(trainer.model)
    return {
        "method": type(trainer).__name__,
        # of a local folder its name alone, as it may lie elsewhere by the time the run goes on
        "model": base_name(source) or (Path(source).name if source else None),
        "adapter": f"{adapter.peft_type.value} r {getattr(adapter, 'r', None)}" if adapter else None,
        "adapter_scheme": getattr(adapter, "scheme", None),
        "data": fingerprint(trainer.train_dataset, trainer.columns_in_identity()),
        "seed": args.seed,
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        "world_size": trainer.accelerator.num_processes,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        **trainer._base_digests,
        **quantisation(trainer.model),
        **identity_of(args),
        **trainer.own_identity(),
    }


def reference_digest(trainer) -> dict[str, str | None]:
    """Digest the `ref_model` that a trainer was given: None for the run's start, {} where a trainer has none.

    Call it at construction: `sync_ref_model` moves the reference later.
    """
    if not hasattr(trainer, "_reference_is_given"):
        return {}
    if not trainer._reference_is_given:
        return {"reference": None}
    split = trainer.is_fsdp_enabled
    return {"reference": "-".join(base_digests(trainer.ref_model, split, whole=True).values())}


def update_settings(trainer) -> dict:
    """Return what else a run must share with the checkpoint it resumes, or the folder that it writes into."""
    adapter = adapter_settings(trainer.model) if adapter_config(trainer.model) else {}
    return adapter | update_of(trainer.args)


def update_of(args) -> dict:
    """Return the upstream settings of a config on which an update depends, by name, as plain JSON."""
    return {name: plain(value) for name, (value, _) in _upstream(args).items()}


def changed_upstream(args, always: Collection[str] = ()) -> dict:
    """Return those of `update_of` that are not at upstream's default, and those of `always`, by name, as they are.

    Without bf16 and fp16, which the machine chooses where nobody does.
    """
    found = {name: both for name, both in _upstream(args).items() if name not in ("bf16", "fp16")}
    return {name: value for name, (value, default) in found.items() if name in always or value != default}


def _upstream(args) -> dict[str, tuple]:
    """Return value and upstream's default of the settings on which an update depends, by name."""
    trl = next(kind for kind in type(args).__mro__ if kind.__module__.split(".")[0] == "trl")
    names = [name for name in (*_UPDATE, *update_of_trl(type(args))) if hasattr(args, name)]
    order = args.accelerator_config
    found = _with_defaults(args, trl, names)
    return found | _with_defaults(order, type(order), [name for name in _ORDER if hasattr(order, name)])


def _with_defaults(holder, kind: type, names: list[str]) -> dict[str, tuple]:
    defaults = defaults_of(kind)
    return {name: (getattr(holder, name), defaults.get(name, getattr(holder, name))) for name in names}


def update_of_trl(config_class: type) -> list[str]:
    """Return the names of the settings that TRL's config declares and on which an update depends."""
    declared = (fields(kind) for kind in config_class.__mro__ if kind.__module__.split(".")[0] == "trl")
    base = {entry.name for entry in fields(TrainingArguments)}
    own = {entry.name for entry in itertools.chain(*declared)} - base - _ASIDE - meanings(config_class).keys()
    return sorted(name for name in own if not _is_aside(name))


def _is_aside(name: str) -> bool:
    return name.startswith(_ASIDE_BY_PREFIX) and not name.startswith(_BUT_NOT)


def adapter_settings(model) -> dict:
    """Return what decides the adapter of a PeftModel as plain JSON: its config, and the modules that it took."""
    settings = {name: value for name, value in adapter_config(model).to_dict().items() if name not in NOT_THE_ADAPTER}
    tuner = model.base_model
    for name, kind in (("target_modules", "targeted_module_names"), ("target_parameters", "targeted_parameter_names")):
        taken = sorted(set(getattr(tuner, kind, ())))
        if taken:
            # a digest of where they lie, beside names that a reader can tell apart
            digest = xxhash.xxh3_64("|".join(taken).encode()).hexdigest()[:6]
            kinds = ", ".join(sorted({path.split(".")[-1] for path in taken}))
            settings[name] = f"{kinds} ({len(taken)} of them, {digest})"
    return {name: plain(value) for name, value in settings.items()}


def differing(now: dict, then: dict, before: dict | None = None) -> str:
    """Say in which entries two identities differ; empty for none. Entries that one of them lacks are passed over.

    `before`: what entries count as that `then`, of the same method in an earlier version, lacks.
    """
    if before and now.get("method") == then.get("method"):
        # a version without schemes had plain adapters
        then = {"adapter_scheme": None} | before | then
    # a marker holds no secrets
    now, then = without_secrets(plain(now)), without_secrets(plain(then))
    names = [name for name in sorted(now.keys() & then) if _compared(name, now[name]) != _compared(name, then[name])]
    # digests say nothing to a reader
    words = {
        "data": "data: other rows there than here",
        "base": "base: a model of another shape there than here",
        "base_weights": "base_weights: other weights under the adapter there than here",
        "reference": f"reference: {_reference_in_words(then)} there, {_reference_in_words(now)} here",
    }
    if now.get("reference") and then.get("reference"):
        words["reference"] = "reference: another ref_model there than here"
    return "; ".join(
        words.get(name, f"{name}: {one_line(then.get(name))} there, {one_line(now.get(name))} here") for name in names
    )


def _compared(name: str, value):
    # one text of several that say the same
    return optimizer_args.canonical(value) if name == "optim_args" and isinstance(value, str) else plain(value)


def _reference_in_words(settings: dict) -> str:
    return "a ref_model" if settings.get("reference") else "no ref_model"
