"""An optimizer and a schedule that go on from a checkpoint under other settings than it was written with.

The files of a checkpoint hold the settings of an optimizer's groups and the base rates of a schedule beside their
state, and loading puts both in place. Where the settings of the run that goes on are others, its own are put back, and
the state stays; where that cannot be done exactly, the run is refused.
"""

import contextlib
import copy
import inspect
from pathlib import Path
from typing import NamedTuple

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.run import optimizer_names, optimizers, schedule
from posttrain.run.identity import differing, update_of

_CURVE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
_SETTINGS = (
    *_CURVE, "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip


class Fresh(NamedTuple):
    """The settings of an optimizer and a schedule as a run made them, before it loads a checkpoint's.

    Attributes:
        groups: the settings of each of the optimizer's groups. rates: the schedule's base rate for each; None of a
            schedule that is no function of the step.
    """

    groups: list[dict[str, object]]
    rates: list[float] | None


def check(trainer, then: dict | None) -> None:
    """Refuse settings of optimizer and schedule that are not a checkpoint's, where they could not be put in place.

    Args:
        trainer: of the run that goes on, with the optimizer's state.
        then: the settings of the checkpoint's run; None where another library wrote it and nothing is known.

    Raises:
        ConfigError: another optimizer; other settings under DeepSpeed or FSDP, with an optimizer that makes its groups
            from the model, or of a schedule that is no function of the step.
    """
    args = trainer.args
    engine = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if then is None:
        if engine:
            get_logger().warning(
                "the learning rate and the settings of the optimizer are those of the checkpoint, whatever this run's "
                "settings say: they cannot be compared, and its engine loads them with the state"
            )
        return
    now = {name: value for name, value in update_of(args).items() if name in _SETTINGS}
    told = differing(now, then)
    if not told:
        return
    name, before = str(now["optim"]), str(then.get("optim", now["optim"]))
    if name != before and (_class_of(args, before) is None or _class_of(args, before) is not _class_of(args, name)):
        raise _refused(told, "the state of an optimizer is of use to that optimizer alone")
    if engine:
        why = "DeepSpeed and FSDP load an optimizer's settings with its state, in parts"
        raise _refused(told, why, weights_alone=not trainer.is_deepspeed_enabled)
    if optimizer_names.makes_groups_of_the_model(name):
        raise _refused(told, f"optim {name} makes its groups from the model's layers")
    if differing({key: now[key] for key in _CURVE if key in now}, then) and schedule.curve(args, 100) is None:
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise _refused(told, f"the rates of lr_scheduler_type {kind} follow from those before")
    get_logger().warning(
        "the optimizer's state goes on under this run's settings, which are not the checkpoint's: %s", told
    )


def _refused(told: str, why: str, weights_alone: bool = True) -> ConfigError:
    otherwise = (
        "go on from its weights alone: `resume_weights_only: true`"
        if weights_alone
        else "start a new run from its weights, in another output_dir"
    )
    return ConfigError(
        f"the checkpoint was written with other settings of the optimizer ({told}), which this run cannot put in the "
        f"place of those: {why}. Resume with the checkpoint's settings, or {otherwise}."
    )


def _class_of(args, name: str) -> type | None:
    """Return the class that a name of `optim` stands for; None of a class of one's own, whose code is not run here."""
    other = copy.copy(args)
    other.optim, other.optim_args = name, None
    with contextlib.suppress(Exception):
        if optimizers.is_upstream(name):
            return Trainer.get_optimizer_cls_and_kwargs(other)[0]
        if name.startswith((f"{optimizers.TORCH}:", f"{optimizers.PACKAGE}:")):
            return optimizers.choose(other).kind
    return None


def fresh(trainer) -> Fresh:
    """Note the settings of a trainer's optimizer and schedule as it made them; call it before they are loaded."""
    groups = [{k: copy.copy(v) for k, v in group.items() if k != "params"} for group in _groups(trainer)]
    rates = list(trainer.lr_scheduler.base_lrs) if isinstance(trainer.lr_scheduler, LambdaLR) else None
    return Fresh(groups, rates)


def check_whole(trainer, own: Fresh, checkpoint: Path | str) -> None:
    """Refuse the groups that a checkpoint brought where they lack a setting that the optimizer reads in each step.

    Raises ConfigError with its name.
    """
    for was, group in zip(own.groups, _groups(trainer), strict=True):
        if lost := sorted(was.keys() - group.keys() - {"initial_lr"}):
            raise ConfigError(
                f"optimizer.pt or scheduler.pt of the checkpoint {checkpoint} cannot be loaded into this run: its "
                f"groups have no {', '.join(lost)}, as of another optimizer. Resume from another checkpoint, or go on "
                "from its weights alone: `resume_weights_only: true`."
            )


def put_back(trainer, own: Fresh) -> None:
    """Set what an optimizer's groups have by its constructor, and its rates, to the run's own; the state stays.

    Args:
        trainer: with the optimizer and the schedule as loaded from a checkpoint. own: what they were before.
    """
    given = set()
    for kind in type(_optimizer(trainer)).__mro__:
        if "__init__" in vars(kind):
            given |= inspect.signature(kind.__init__).parameters.keys()
    for was, group in zip(own.groups, _groups(trainer), strict=True):
        # by other names an optimizer keeps state in its groups
        group.update({name: was[name] for name in was.keys() & given - {"lr", "params"}})
    if own.rates is None:
        return
    for rate, group in zip(own.rates, _groups(trainer), strict=True):
        group["initial_lr"] = rate
    trainer.lr_scheduler.base_lrs = list(own.rates)
    schedule.move_to(trainer.lr_scheduler, trainer.lr_scheduler.last_epoch)


def _optimizer(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def _groups(trainer) -> list[dict]:
    return _optimizer(trainer).param_groups
