"""An evaluation's results: each set under its own name, all rows of each group in `compute_metrics`."""

import math

import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.mechanisms.row_groups import RowGroups
from posttrain.mechanisms.window import real_rows


def forget(trainer) -> None:
    """Drop the metrics that an interrupted evaluation, or a forward by hand, has left."""
    trainer._metrics["eval"].clear()


def take_metrics(trainer, prefix: str) -> dict[str, float | None]:
    """Return the means of an evaluation's metrics as `<prefix>_<name>`; TRL's `log` would name all `eval_<name>`.

    NaN entries are left out; `trainer.no_value` stands where nothing else is there.
    """
    kept, found = trainer._metrics["eval"], {}
    for name, values in kept.items():
        valid = [value for value in values if not math.isnan(value)]
        found[f"{prefix}_{name}"] = sum(valid) / len(valid) if valid else trainer.no_value
    kept.clear()
    return found


def check_sets(args, eval_dataset) -> None:
    """Refuse an evaluation without rows, and a `metric_for_best_model` that belongs to none of several sets.

    Raises:
        ConfigError: in each of these cases; each metric of several sets begins with the name of its set.
    """
    if args.eval_strategy != "no" and eval_dataset is None:
        when = getattr(args.eval_strategy, "value", args.eval_strategy)
        raise ConfigError(
            f'eval_strategy is {when}, and eval_dataset is missing. Give one, or set `eval_strategy: "no"`.'
        )
    if not isinstance(eval_dataset, dict) or args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    wanted = args.metric_for_best_model.removeprefix("eval_")
    if any(wanted.startswith(f"{name}_") for name in eval_dataset):
        return
    names = list(eval_dataset)
    raise ConfigError(
        f"metric_for_best_model is {args.metric_for_best_model!r}, and eval_dataset has several sets, so that metrics "
        f"are named by their set ({', '.join(map(str, names))}). Set it to one set's metric, such as "
        f"`metric_for_best_model: eval_{names[0]}_{wanted}`."
    )


class GroupRows:
    """Gathers an evaluation batch over ranks, whole groups of rows at a time; replaces `Trainer.gather_function`.

    A pair is a group of two rows. Upstream cuts the last batch to as many rows as there are groups left, so that
    rejected rows would be missing from `compute_metrics`.
    """

    def __init__(self, accelerator) -> None:
        self._accelerator, self._keep, self._losses_next, self._unequal = accelerator, None, False, False

    def begin(self, groups: RowGroups, device, unequal: bool = False) -> None:
        """Note the batch just computed, of `groups` on this rank; all ranks call it.

        `unequal`: ranks may differ in their rows; the same on all of them.
        """
        self._losses_next, self._unequal = True, unequal
        real = torch.arange(groups.count, device=device) < real_rows(self._accelerator, groups.count)
        keep = self._gather(groups.to_rows(real).int()).bool()
        self._keep = None if keep.all() else keep

    def __call__(self, data):
        if self._losses_next:
            # the loop gathers the losses first, which are one a group
            self._losses_next = False
            return self._accelerator.gather_for_metrics(data)
        return recursively_apply(self._rows, data)

    def _rows(self, tensor: Tensor) -> Tensor:
        gathered = self._gather(tensor)
        return gathered if self._keep is None else gathered[self._keep]

    def _gather(self, tensor: Tensor) -> Tensor:
        # rows that are filled up with zeros are not kept
        return self._accelerator.gather(self._accelerator.pad_across_processes(tensor) if self._unequal else tensor)
