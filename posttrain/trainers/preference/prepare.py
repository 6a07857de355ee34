"""What a preference run needs before any weights are there: checks, tokens, steps."""

from decimal import Decimal

import torch
from accelerate.utils import is_peft_model

from posttrain.data import columns, formats
from posttrain.data.limits import Limits
from posttrain.data.pairs import loading, schema
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger
from posttrain.run import checks, evaluation, private_settings
from posttrain.run.prepared import Prepared, check_fills_a_batch

# Columns of a data set that training reads
READ = (*loading.COLUMNS, *formats.TOKEN_COLUMNS, "image", "images")


def prepare(model, args, config, processing_class, train_dataset, eval_dataset) -> Prepared:
    """Check settings and pairs as far as that needs no weights, and put their columns in place.

    Args:
        model: its name, or the model itself. config: the model's.
        processing_class: a tokenizer or processor, or None for the model's own.
        train_dataset: preference rows, or a stream of them. eval_dataset: likewise, several by name, or None.

    Raises:
        ConfigError, DataError, EnvironmentIssue: settings, rows or a tokenizer that cannot be trained with.
    """
    checks.check_model_config(args, config, args.weighs_pairs)
    train_dataset = columns.prepare(train_dataset, "train_dataset", READ)
    eval_dataset = columns.prepare(eval_dataset, "eval_dataset", READ)
    limits = Limits(model, config)
    reports = schema.check_run(model, processing_class, args, train_dataset, eval_dataset, limits)
    check_flip_rates(args, train_dataset, eval_dataset)
    evaluation.check_sets(args, eval_dataset)
    rows, report = None, (reports or {}).get("train_dataset")
    if hasattr(train_dataset, "__len__"):
        lengths = report.lengths if report is not None else None
        rows, dropped = len(train_dataset), lengths.dropped if lengths else 0
        # of a large data set only a sample was looked at
        if dropped:
            rows = rows - dropped if lengths.rows == rows else None
    check_fills_a_batch(args, rows)
    # pairs that will be dropped are counted in, as which these are is known of all of them once they are tokenised
    plan = None if args.privacy is None else private_settings.planned(args, train_dataset)
    return Prepared(train_dataset, eval_dataset, limits, rows, plan=plan)


def prompt_limit(args) -> int | None:
    """Return the length in tokens from which on a prompt leaves nothing of its answers, and drops its pair.

    None where none is dropped.
    """
    return args.max_length if args.truncation_mode == "keep_start" else None


def check_reference_is_loadable(model, ref_model, args, peft_config) -> None:
    """Refuse full fine-tuning whose reference TRL would load by a name that the model does not have."""
    if isinstance(ref_model, str):
        raise ConfigError(
            f"ref_model is {ref_model!r}; it must be a loaded model, such as "
            f"AutoModelForCausalLM.from_pretrained({ref_model!r}). Leave it out where the reference is the model as "
            "the run begins."
        )
    if not isinstance(model, torch.nn.Module) or ref_model is not None or peft_config is not None:
        return
    if is_peft_model(model) or args.precompute_ref_log_probs or getattr(model.config, "_name_or_path", ""):
        return
    raise ConfigError(
        "the model was built in code, and its reference is to be loaded by a name, which it does not have. Pass "
        "`ref_model=copy.deepcopy(model)`, or a `peft_config`, or set `precompute_ref_log_probs: true`."
    )


def check_flip_rates(args, train_dataset, eval_dataset) -> None:
    """Refuse a flip_rate column with an impossible rate, where the loss reads it."""
    if not args.reads_flip_rate:
        if "flip_rate" in (getattr(train_dataset, "column_names", None) or ()):
            get_logger().warning("train_dataset's column flip_rate is not read by %s", args.flip_rate_is_not_read_by)
        return
    named = {"train_dataset": train_dataset}
    named.update(eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset})
    for name, dataset in named.items():
        if "flip_rate" not in (getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "__len__"):
            continue
        for row, rate in enumerate(dataset["flip_rate"], 1):
            if isinstance(rate, bool) or not isinstance(rate, int | float):
                what = "null" if rate is None else f"{rate!r}, of type {type(rate).__name__}"
                cast = ""
                if isinstance(rate, str | Decimal):
                    cast = '\n  dataset = dataset.cast_column("flip_rate", Value("float64"))  # of datasets'
                raise DataError(
                    f"{name} has a flip_rate of {what} in row {row}; every row's flip_rate must be a number in "
                    f"[0, 0.5).{cast}"
                )
            if not 0 <= rate < 0.5:
                raise DataError(
                    f"{name} has a flip_rate of {rate} in row {row}; every row's flip_rate must lie in [0, 0.5)."
                )
