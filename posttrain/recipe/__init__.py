"""What every recipe does around its trainer: the model and adapter it names, its splits, and the end of a run."""

import functools
from collections.abc import Callable
from pathlib import Path

from posttrain.adapters.schemes import adapter_config
from posttrain.config import DataArguments, ModelArguments, is_local
from posttrain.config.mixture import rows_of_each
from posttrain.errors import ConfigError
from posttrain.models import resolve_model
from posttrain.private import hide
from posttrain.recipe.ending import run_main as run_main
from posttrain.run import lock
from posttrain.visible import visible


def named_model(data_args: DataArguments, model_args: ModelArguments, training_args):
    """Return the model's id or folder and the adapter's config (or None); puts how to load it into `training_args`.

    Raises ConfigError where model_name_or_path, or dataset_name and datasets, are missing.
    """
    for name, there in (("model_name_or_path", model_args.model_name_or_path), ("dataset_name", data_args.sources)):
        if not there:
            raise ConfigError(f"{name} is not set; give it in the config file or as --{name} VALUE.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        **(training_args.model_init_kwargs or {}),
    }
    # a dry run tells what its weights take
    training_args.model_settings = model_args
    return resolve_model(model_args.model_name_or_path), adapter_config(model_args)


def load_splits(load: Callable, data_args: DataArguments, evaluate: bool, seed: int):
    """Load the training rows, and those for evaluation (or None) if some are named or `evaluate` asks for them.

    Args:
        load: `load(name, split, limit)` reads one data set; it takes `convert=False` where rows are to be read as they
            are, and `name`, `data_dir` and `data_files` of `datasets.load_dataset` by `given`.
        data_args: which data sets. Of several each is read and checked on its own, then they are put together.
        evaluate: whether the run evaluates.
        seed: draws the rows of `test_split_size`.

    Raises:
        ConfigError: nothing is there to evaluate on. DataError: as `load`, and where data sets do not fit together.
    """
    if not data_args.convert_rows:
        load = functools.partial(load, convert=False)
    train_dataset = _training_rows(load, data_args)
    eval_name, size = data_args.eval_dataset_name, data_args.test_split_size
    if eval_name is None and size is not None:
        try:
            parted = train_dataset.train_test_split(test_size=size, seed=seed)
        except ValueError:
            raise ConfigError(
                f"test_split_size is {size} of {len(train_dataset)} training rows, which leaves none on one of the two "
                "sides; change it, or give eval_dataset_name."
            ) from None
        held_out, limit = parted["test"], data_args.max_eval_rows
        return parted["train"], held_out if limit is None else held_out.select(range(min(limit, len(held_out))))
    if eval_name is None:
        if not evaluate:
            return train_dataset, None
        if data_args.datasets is not None or Path(data_args.dataset_name).is_file():
            which = (
                "datasets name no rows for it"
                if data_args.datasets
                else (f"the file {data_args.dataset_name} has no splits")
            )
            raise ConfigError(
                f"eval_strategy asks for evaluation, but {which}. Set eval_dataset_name to another file, or "
                'test_split_size to the share of rows to hold out, or eval_strategy: "no".'
            )
        eval_name = data_args.dataset_name
    return train_dataset, load(eval_name, data_args.dataset_test_split, data_args.max_eval_rows)


def _training_rows(load: Callable, data_args: DataArguments):
    if data_args.datasets is None:
        return load(data_args.dataset_name, data_args.dataset_train_split, data_args.max_train_rows)
    from posttrain.data.mixture import mix, select_columns

    parts = {}
    for number, entry in enumerate(data_args.datasets):
        given = {name: getattr(entry, name) for name in ("name", "data_dir", "data_files")}
        given = {name: value for name, value in given.items() if value is not None}
        found = load(entry.path, entry.split, data_args.max_train_rows, **given)
        name = f"datasets[{number}] ({entry.path})"
        parts[name] = select_columns(found, entry.columns, name)
    counts = rows_of_each([len(part) for part in parts.values()], [entry.fraction for entry in data_args.datasets])
    if not any(counts):
        raise ConfigError("datasets: the fractions leave no row of so few; change them, or leave them out.")
    return mix(parts, counts)


def train(trainer, data_args: DataArguments, evaluate: bool) -> None:
    """Train, evaluate where asked to, save, write the card, push if the settings say so; all ranks call it."""
    with lock.held(trainer.args.output_dir, trainer.accelerator):
        _train(trainer, data_args, evaluate)


def _train(trainer, data_args: DataArguments, evaluate: bool) -> None:
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
    trainer.accelerator.print(visible(hide(f"Saved to {args.output_dir}")))
    if args.push_to_hub:
        trainer.push_to_hub(**on_hub)
    trainer.end()


def hub_data(data_args: DataArguments) -> dict:
    """Name the data sets of a run for its card, as `posttrain.hub.write_model_card` takes them."""
    sources = data_args.sources
    evaluated = data_args.eval_dataset_name or (None if data_args.test_split_size else data_args.dataset_name)
    if evaluated is not None and is_local(evaluated):
        evaluated = None
    weighed = sum(source.fraction or 0 for source in sources)
    return {
        "dataset_name": [source.path for source in sources if not is_local(source.path)],
        "eval_dataset_name": evaluated,
        "eval_split": data_args.dataset_test_split if evaluated else None,
        "mixture": [
            (None if is_local(source.path) else source.path, source.fraction / weighed if weighed else None)
            for source in data_args.datasets or ()
        ],
    }
