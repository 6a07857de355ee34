"""Rows of scored answers on their way to a batch: left out without a gradient, collated."""

import torch
from accelerate.utils import is_peft_model

from posttrain.data.scored import scales
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger
from posttrain.run.prepared import check_fills_a_batch
from posttrain.run.window import ExtraColumns
from posttrain.trainers.offline.reference_logps import COLUMN


def with_gradient(dataset, args):
    """Return the training rows that have a gradient; refuse none, or too few for a batch."""
    weights = dataset["weight"][:]
    kept = [i for i, weight in enumerate(weights) if weight != 0]
    if not kept:
        raise DataError(f"train_dataset: the weight of all {len(weights)} answers is 0; none would be learned from.")
    check_fills_a_batch(args, len(kept))
    if len(kept) == len(weights):
        return dataset
    get_logger().info(
        "train_dataset: %d of %d rows have no gradient and are left out", len(weights) - len(kept), len(weights)
    )
    return dataset.select(kept)


def check_rows_left(dataset, args) -> None:
    """Refuse a data set of which no row has an answer left within `max_length`."""
    if not len(dataset):
        raise DataError(f"train_dataset: max_length {args.max_length} leaves nothing of any answer. Set a larger one.")


def check_scales(train_dataset, named: dict) -> None:
    """Refuse data sets for evaluation whose rewards are on another scale than those trained on."""
    rewards = train_dataset["reward"][:]
    for name, dataset in named.items():
        scales.check_scales({"train_dataset": rewards, name: dataset["reward"][:]}, "data sets")


class AnswerColumns(ExtraColumns):
    """Collates, beside columns of one number a row, the reference's token log-probabilities (B, L - 1)."""

    def __call__(self, examples: list[dict]) -> dict:
        batch = super().__call__(examples)
        if COLUMN in examples[0]:
            mask = batch["labels"][:, 1:] != -100
            logps = torch.zeros(mask.shape)
            logps[mask] = torch.tensor([value for example in examples for value in example[COLUMN]])
            batch["ref_per_token_logps"] = logps
        return batch


def check_stream(args, dataset) -> None:
    """Refuse a stream where rows are drawn by weight."""
    if dataset is not None and not hasattr(dataset, "__len__") and args.drawn_by is not None:
        raise ConfigError(
            f"train_dataset is a stream, and {args.drawn_by}: rows are drawn by their weights, which are known of all "
            "rows or not at all. Load it into memory, "
            "`datasets.Dataset.from_list(list(stream.take(n)))`."
        )


def refuse(model, peft_config, kwargs: dict) -> None:
    """Refuse arguments that SFTTrainer takes and this trainer does not."""
    for name in ("compute_loss_func", "formatting_func"):
        if kwargs.get(name) is not None:
            raise ConfigError(f"{name} is given, which this trainer does not use. Leave it out.")
    adapters = [peft_config] if peft_config is not None else []
    if isinstance(model, torch.nn.Module) and is_peft_model(model):
        adapters += model.peft_config.values()
    for adapter in adapters:
        if getattr(adapter, "is_prompt_learning", False):
            raise ConfigError(
                f"the adapter is {adapter.peft_type.value}, whose virtual tokens stand in front of the prompt; "
                "log-probabilities of answers would be read one token off. Use LoRA."
            )
