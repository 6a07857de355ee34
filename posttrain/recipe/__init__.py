"""What every recipe does around its trainer: the model and adapter it names, its splits, and the end of a run."""

import functools
from collections.abc import Callable
from pathlib import Path

from posttrain.config import DataArguments, ModelArguments, get_peft_config, is_local
from posttrain.errors import ConfigError
from posttrain.models import resolve_model


def named_model(data_args: DataArguments, model_args: ModelArguments, training_args):
    """The model's id or folder and the adapter's config (or None); how to load the model goes into `training_args`.

    Raises ConfigError where model_name_or_path or dataset_name is missing.
    """
    for name, arguments in (("model_name_or_path", model_args), ("dataset_name", data_args)):
        if not getattr(arguments, name):
            raise ConfigError(f"{name} is not set; give it in the config file or as --{name} VALUE.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        **(training_args.model_init_kwargs or {}),
    }
    return resolve_model(model_args.model_name_or_path), get_peft_config(model_args)


def load_splits(load: Callable, data_args: DataArguments, evaluate: bool):
    """The training rows, and those for evaluation (or None) if some are named or `evaluate` asks for them.

    `load(name, split, limit)` reads one of them; it takes `convert=False` where rows are to be read as they are.
    """
    if not data_args.convert_rows:
        load = functools.partial(load, convert=False)
    train_dataset = load(data_args.dataset_name, data_args.dataset_train_split, data_args.max_train_rows)
    eval_name = data_args.eval_dataset_name
    if eval_name is None:
        if not evaluate:
            return train_dataset, None
        if Path(data_args.dataset_name).is_file():
            raise ConfigError(
                f"eval_strategy asks for evaluation, but the file {data_args.dataset_name} has no splits. "
                'Set eval_dataset_name to another file, or eval_strategy: "no".'
            )
        eval_name = data_args.dataset_name
    return train_dataset, load(eval_name, data_args.dataset_test_split, data_args.max_eval_rows)


def train(trainer, data_args: DataArguments, evaluate: bool) -> None:
    """Train, evaluate where asked to, save, write the card, push if the settings say so; all ranks call it."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if evaluate:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    # Every rank saves: under ZeRO-3 each one holds a part of the weights.
    # The push comes once, with the card.
    trainer.save_model(_internal_call=True)
    on_hub = hub_data(data_args)
    trainer.create_model_card(**on_hub)
    trainer.accelerator.print(f"Saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(**on_hub)
    trainer.end()


def hub_data(data_args: DataArguments) -> dict:
    """Name the data sets of a run that are on the hub, as `posttrain.hub.write_model_card` takes them."""
    evaluated = data_args.eval_dataset_name or data_args.dataset_name
    return {
        "dataset_name": None if is_local(data_args.dataset_name) else data_args.dataset_name,
        "eval_dataset_name": None if is_local(evaluated) else evaluated,
        "eval_split": None if is_local(evaluated) else data_args.dataset_test_split,
    }
