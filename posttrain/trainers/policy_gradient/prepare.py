"""What a run on rollouts needs before any weights are there: checks, tokens, steps."""

import torch
from datasets import Dataset

from posttrain.checks import shorten
from posttrain.data import columns
from posttrain.data.limits import Limits
from posttrain.data.processing import generation_stop_ids, processing_class_for, tokenizer_of
from posttrain.data.rows import by_name, refuse_splits
from posttrain.data.tasks import task_rows, tokens
from posttrain.data.tokens import as_rendered
from posttrain.errors import ConfigError, DataError, require
from posttrain.mechanisms import special_tokens
from posttrain.objectives import advantages
from posttrain.rewards.base import check_missing_golds
from posttrain.run import evaluation
from posttrain.run.prepared import Prepared
from posttrain.user_code import import_function
from posttrain.visible import listed


def prepare(model, args, config, processing_class, train_dataset, eval_dataset, given=None, rewards=()) -> Prepared:
    """Check settings and tasks as far as that needs no weights, and tokenise demonstrations.

    Args:
        model: its name, or the model itself. config: the model's.
        processing_class: a tokenizer or processor, or None for the model's own.
        train_dataset: tasks, or a stream of them. eval_dataset: likewise, several by name, or None.
        given: what else the trainer is given by name; tools and an environment make answers conversations.
        rewards: reward functions, asked whether they can do without gold answers that are missing.

    Raises:
        ConfigError, DataError, EnvironmentIssue: settings, rows or a tokenizer that cannot be trained with.
    """
    if args.use_vllm:
        require("vllm", "vllm", "use_vllm")
    if args.sync_ref_model and args.beta == 0:
        raise ConfigError(
            "sync_ref_model is true and beta is 0, at which nothing reads a reference that could be synced. Set a beta "
            "above 0, or leave sync_ref_model out."
        )
    _check_prompts(train_dataset, eval_dataset, given or {})
    for name, dataset in {"train_dataset": train_dataset, **by_name(eval_dataset)}.items():
        check_missing_golds(rewards, dataset, name)
    train_dataset = columns.prepare(train_dataset, "train_dataset")
    eval_dataset = columns.prepare(eval_dataset, "eval_dataset")
    check_generation(args, train_dataset)
    evaluation.check_sets(args, eval_dataset)
    limits, processor = Limits(model, config), processing_class_for(model, processing_class, args)
    tokenizer = tokenizer_of(processor)
    if args.kept_tokens:
        special_tokens.check_kept(args.kept_tokens, tokenizer)
    train_dataset = as_rendered(train_dataset, tokenizer, False, "train_dataset")
    eval_dataset = _all_rendered(eval_dataset, tokenizer)
    named = by_name(eval_dataset)
    for name, dataset in {"train_dataset": train_dataset, **named}.items():
        task_rows.check(dataset, tokenizer, args, name)
    if args.learns_from_demonstrations:
        if config.get_text_config() is not config:
            raise ConfigError("demonstrations for a multimodal model are not supported. Set `gamma: null`.")
        stop_ids = generation_stop_ids(model, (args.model_init_kwargs or {}).get("revision"))
        train_dataset = tokens.tokenise(train_dataset, tokenizer, args, "train_dataset", stop_ids)
        limits.check(train_dataset, ((tokens.IDS,),), processor, "train_dataset", None)
    for name, dataset in {"train_dataset": train_dataset, **named}.items():
        limits.check_prompts(dataset, processor, args, name)
    rows = len(train_dataset) if hasattr(train_dataset, "__len__") else None
    return Prepared(train_dataset, eval_dataset, limits, rows)


def has_live_reference(args) -> bool:
    """Return whether the KL penalty reads a reference; an adapter's is the policy itself, with its adapter off."""
    return args.beta != 0


def micro_batches(args, rows: int) -> int:
    """Return how many micro-batches an epoch over so many tasks has: those of its whole generations."""
    return (
        rows // (args.generation_batch_size // args.num_generations) * args.steps_per_generation * args.num_iterations
    )


def check_generation(args, train_dataset) -> None:
    """Refuse data sets smaller than one generation batch: TRL's sampler would yield nothing of them."""
    prompts = args.generation_batch_size // args.num_generations
    if hasattr(train_dataset, "__len__") and len(train_dataset) < prompts:
        raise DataError(
            f"train_dataset has {len(train_dataset)} rows, and a generation takes {prompts} prompts "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}). Give more "
            "rows, or make per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation smaller."
        )


def advantage_function(args):
    """Return the function from rewards (prompts, G) to advantages (prompts, G); None for TRL's own."""
    if ":" in args.advantage:
        return import_function(args.advantage, "advantage", args.allow_code)
    if args.advantage == "leave_one_out":
        return advantages.leave_one_out_advantage
    if args.advantage == "reward":
        return lambda rewards: torch.nan_to_num(rewards, nan=0.0)
    if args.advantage == "quantile" and args.quantile is not None:
        return lambda rewards: advantages.quantile_advantage(
            rewards, args.quantile, scale=args.scale_rewards, interpolation=args.quantile_interpolation
        )
    return None


def _all_rendered(datasets, tokenizer):
    """Prepare a data set, several by name, or None for the chat template."""
    if isinstance(datasets, dict):
        return {name: as_rendered(dataset, tokenizer, False, name) for name, dataset in datasets.items()}
    return None if datasets is None else as_rendered(datasets, tokenizer, False, "eval_dataset")


def _check_prompts(train_dataset, eval_dataset, given: dict) -> None:
    """Refuse rows without a prompt, except where an environment provides them."""
    refuse_splits(train_dataset)
    environment = given.get("environment_factory") is not None
    in_turns = environment or bool(given.get("tools"))
    named = {"train_dataset": train_dataset}
    named.update(eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset})
    for name, dataset in named.items():
        columns = getattr(dataset, "column_names", None)
        if columns and "prompt" not in columns and not environment:
            raise DataError(f"{name} has no column 'prompt'. Found: {listed(columns)}. Rename or add it.")
        if hasattr(dataset, "__len__") and not len(dataset):
            raise DataError(f"{name} has no rows.")
        if not isinstance(dataset, Dataset) or "prompt" not in columns:
            continue
        for row, prompt in enumerate(dataset["prompt"], 1):
            messages = isinstance(prompt, list) and all(isinstance(turn, dict) and turn.get("role") for turn in prompt)
            if not prompt or not (messages or isinstance(prompt, str)):
                raise DataError(
                    f"{name}, row {row}: the prompt is {shorten(prompt)}; it must be a text, or a list of messages "
                    "that each have a role. Mend the row or leave it out."
                )
            if in_turns and isinstance(prompt, str):
                raise DataError(
                    f"{name}, row {row}: the prompt is a text, and answers with tools or an environment are turns of a "
                    "conversation. Give it as a list of messages, such as [{'role': 'user', 'content': ...}]."
                )
