"""The state of training in a checkpoint: looked at before anything is loaded, and answered in words where it is none.

Optimizer, schedule and random state are read as tensors and plain values alone; a pickle in them is not run.
"""

import contextlib
import pickle
import random
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from posttrain.errors import ConfigError, DataError, PosttrainError
from posttrain.run import checkpoint_files as files
from posttrain.run import optimizer_state
from posttrain.run.markers import is_number
from posttrain.saved import check_safetensors, read_json
from posttrain.visible import one_line

# what a file of another form brings where it is taken for a state
_OTHER_FORM = (AttributeError, EOFError, IndexError, KeyError, OverflowError, TypeError, ValueError, pickle.PickleError)
_OPTIMIZER = "optimizer.pt"
_WEIGHTS = (
    files.ADAPTER[0], files.MODEL[0], "model-*-of-*.safetensors", f"*/{files.ADAPTER[0]}",
)  # fmt: skip
# Fields of transformers' state that a run reckons with
_COUNTS = ("global_step", "max_steps")
_NUMBERS = ("epoch", "eval_steps", "logging_steps", "num_input_tokens_seen", "save_steps", "total_flos")
_KINDS = {
    "best_metric": int | float, "best_global_step": int, "best_model_checkpoint": str, "log_history": list,
    "stateful_callbacks": dict, "train_batch_size": int, "trial_params": dict,
}  # fmt: skip


def trainer_state(folder: Path) -> dict:
    """Read transformers' state of a checkpoint; ConfigError where it cannot be read, or is of another form."""
    path = folder / files.TRAINER_STATE
    try:
        state = read_json(path)
    except DataError:
        state = {}
    if not _is_trainer_state(state):
        raise ConfigError(f"{path} cannot be read as the state of a trainer. Resume from another checkpoint.")
    return state


def fault(folder: Path, weights_only: bool = False) -> str:
    """Say which file of a checkpoint does not hold the state that its name says; empty where all do.

    What depends on the run that resumes, such as the shapes of its parameters, is for `misfit`.

    Args:
        folder: of the checkpoint.
        weights_only: optimizer and schedule are not going to be loaded.
    """
    try:
        trainer_state(folder)
    except ConfigError:
        return f"{files.TRAINER_STATE} cannot be read as the state of a trainer"
    for path in sorted(path for form in _WEIGHTS for path in folder.glob(form) if path.is_file()):
        name = one_line(path.relative_to(folder).as_posix())
        try:
            check_safetensors(path)
            if nameless := _not_a_number(path):
                return f"{name} holds numbers that are none (NaN), in {one_line(nameless)[:200]}"
        except (DataError, SafetensorError):
            return f"{name} cannot be read as safetensors"
    checked = {path.name: _check_random for path in (*folder.glob("rng_state.pth"), *folder.glob("rng_state_*.pth"))}
    checked["scaler.pt"] = _check_scaler
    if not weights_only:
        checked |= {"optimizer.pt": optimizer_state.check_form, "scheduler.pt": _schedule_check(folder)}
    for name, check in sorted(checked.items()):
        if not (folder / name).is_file():
            continue
        try:
            check(_loaded(folder / name))
        except (*_OTHER_FORM, RuntimeError) as error:
            return f"{one_line(name)} holds no such state ({_reason(error)})"
    return ""


def check_intervals(args, state, checkpoint: Path) -> None:
    """Refuse a checkpoint whose state has no steps between two logs, saves or evaluations that go by steps here.

    Args:
        args: the trainer's config.
        state: transformers' state of the run, as loaded from the checkpoint.
        checkpoint: its folder.
    """
    for name in ("logging", "save", "eval"):
        strategy = getattr(args, f"{name}_strategy")
        if getattr(strategy, "value", strategy) == "steps" and not getattr(state, f"{name}_steps"):
            raise ConfigError(
                f"{checkpoint / files.TRAINER_STATE} has no {name}_steps, and {name}_strategy is steps. Set "
                f'`{name}_strategy: "no"`, or resume from another checkpoint.'
            )


def check_scaler(scaler, checkpoint: Path) -> None:
    """Refuse a checkpoint with the state of a gradient scaler where the run has none. `scaler`: of the run."""
    if scaler is None and (checkpoint / "scaler.pt").is_file():
        raise ConfigError(
            f"the checkpoint {checkpoint} holds scaler.pt, the state of a gradient scaler, and this run has none. "
            "Train with `fp16: true` as that run did, or move scaler.pt out of the checkpoint."
        )


_WITHOUT_STATE = ", or go on from its weights alone: `resume_weights_only: true`"


@contextlib.contextmanager
def answered(checkpoint, names: str, otherwise: str = _WITHOUT_STATE):
    """Raise ConfigError, inside, where the files of a checkpoint do not fit the run that loads them.

    `otherwise`: what can be done beside resuming from another one.
    """
    try:
        yield
    except PosttrainError:
        raise
    except _OTHER_FORM as error:
        raise ConfigError(
            f"{names} of the checkpoint {checkpoint} cannot be loaded into this run: {_reason(error)}. Resume from "
            f"another checkpoint{otherwise}."
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it is no file of tensors and plain values, and code in it is not run"
    return f"{type(error).__name__}: {one_line(str(error).splitlines()[0] if str(error) else '')[:200]}"


def _is_trainer_state(state: dict) -> bool:
    return (
        state.keys() <= {field.name for field in fields(TrainerState)}
        and all(type(state.get(name)) is int and state[name] >= 0 for name in _COUNTS)
        and all(state.get(name) is None or is_number(state[name]) for name in _NUMBERS)
        and all(state.get(name) is None or isinstance(state[name], kind) for name, kind in _KINDS.items())
        and all(map(_is_row, state.get("log_history") or ()))
    )


def _is_row(row) -> bool:
    return isinstance(row, dict) and type(row.get("step")) is int and is_number(row.get("num_tokens", 0))


def _loaded(path: Path):
    # an optimizer may be several times as large as its model: its tensors are mapped, and not read
    with safe_globals():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _schedule_check(folder: Path):
    """Return a check of a schedule, for as many groups as the optimizer beside it has."""

    def check(content) -> None:
        groups = None
        if (folder / _OPTIMIZER).is_file():
            with contextlib.suppress(*_OTHER_FORM, RuntimeError):
                groups = len(_loaded(folder / _OPTIMIZER)["param_groups"])
        _check_schedule(content, groups)

    return check


def _not_a_number(path: Path) -> str:
    """Name a tensor of a file of safetensors that holds NaN; empty where none does."""
    with safe_open(path, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if not optimizer_state.is_finite(tensors.get_tensor(name), nan_alone=True):
                return name
    return ""


def misfit(folder: Path, trainer) -> str:
    """Say what of a checkpoint's optimizer and schedule does not fit the run that resumes; empty where all does.

    Files that cannot be read are left to `fault`, and those of an engine that spreads the state to the engine.
    """
    found = optimizer_state.groups_of(trainer)
    if found is None or not (folder / _OPTIMIZER).is_file():
        return ""
    try:
        content = _loaded(folder / _OPTIMIZER)
        optimizer_state.check_form(content)
        schedule = _loaded(folder / "scheduler.pt") if (folder / "scheduler.pt").is_file() else {}
        step = trainer_state(folder)["global_step"]
    except (*_OTHER_FORM, RuntimeError):
        return ""
    told = optimizer_state.misfit(content, *found)
    if not told and trainer.optimizer is not None:
        told = optimizer_state.other_settings(content, trainer.optimizer)
    if told:
        return f"{_OPTIMIZER} {one_line(told)}"
    own = trainer.lr_scheduler is None or trainer._created_lr_scheduler
    if own and "base_lrs" in schedule and schedule.get("last_epoch", 0) > step:
        return f"scheduler.pt is at step {schedule['last_epoch']}, and {files.TRAINER_STATE} at step {step}"
    return ""


def _check_schedule(content, groups: int | None = None) -> None:
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise TypeError(f"a {type(content).__name__}")
    if any(callable(getattr(kind, name, None)) for name in content for kind in (LambdaLR, ReduceLROnPlateau)):
        raise TypeError("it would replace a part of the program")
    if "optimizer" in content:
        raise TypeError("it would replace a part of the program")
    optimizer_state.check_schedule_lists(content, groups)


def _check_scaler(content) -> None:
    if not isinstance(content, dict):
        raise TypeError(f"a {type(content).__name__}")


def _check_random(content) -> None:
    random.Random().setstate(content["python"])
    np.random.RandomState().set_state(content["numpy"])
    torch.Generator().set_state(content["cpu"])
