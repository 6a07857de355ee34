"""What a run has before its weights are there: its rows, and what a dry run tells of them."""

import math
from dataclasses import dataclass, field

from posttrain.errors import ConfigError


@dataclass
class Prepared:
    """Holds what a family's `prepare` hands to the trainer's constructor and to the dry run.

    Attributes:
        train_dataset, eval_dataset: as the parent trainer takes them; the latter one, several by name, or None.
        limits: what the model can take in.
        rows: how many rows are trained on; None where that is not known yet.
        facts: what there is to tell of them, by name.
        plan: of the steps, where a method draws its rows and their tokens are known; with `steps` and `told()`.
    """

    train_dataset: object
    eval_dataset: object
    limits: object
    rows: int | None = None
    facts: dict = field(default_factory=dict)
    plan: object = None


def check_fills_a_batch(args, rows: int | None) -> None:
    """Raise ConfigError where `dataloader_drop_last` leaves no batch to train on; `rows`: None where not known."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows is not None and rows < batch:
        ranks = f" on each of {args.world_size} processes" if args.world_size > 1 else ""
        raise ConfigError(
            f"{rows} kept rows fill no batch of {batch} (per_device_train_batch_size {args.train_batch_size}{ranks}), "
            "and dataloader_drop_last leaves out what is not full, so no step would be taken. Set "
            "`dataloader_drop_last: false`, or a smaller per_device_train_batch_size."
        )


def micro_batches(args, rows: int, processes: int | None = None) -> int:
    """Return how many micro-batches an epoch over so many rows has on each process."""
    full = math.floor if args.dataloader_drop_last else math.ceil
    return full(rows / (args.per_device_train_batch_size * (processes or args.world_size)))


def steps(args, micro_batches: int) -> int:
    """Return how many optimiser steps a run has with so many micro-batches an epoch; an epoch ends on a short step."""
    if args.max_steps > 0:
        return args.max_steps
    steps_an_epoch = math.ceil(micro_batches / args.gradient_accumulation_steps)
    return math.ceil(steps_an_epoch * args.num_train_epochs)
