"""What an optimizer's state in a checkpoint may be: of finite numbers, and of the shapes of the parameters it is for.

Kernels of optimizers trust the shapes of their state; one of another shape has them read and write beyond it.
"""

import math
from collections.abc import Sequence

import torch

from posttrain.run.optimizer_names import SHARDABLE

# of one number for each parameter's number
_MOMENTS = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta",
    "sum", "ax", "prev", "step_size", "state1", "state2", "m1_m2", "nu", "variance",
    # of pytorch_optimizer's elementwise ones
    "exp_avg_slow", "exp_avg_var", "max_exp_avg_var", "exp_avg_diff", "exp_avg_lr", "exp_mean_avg_beta2",
    "previous_grad", "grad_sum_sq", "x0", "grad_buffer", "i_buffer", "d_buffer", "pos_momentum", "neg_momentum",
}  # fmt: skip
# Adam's alone, without which its step ends in an error
_ADAM = {"step", "exp_avg", "exp_avg_sq"}
# Modules of optimizers of which all state is known here
_KNOWN = ("torch.optim.", "transformers.optimization", "bitsandbytes.optim.")
# of D-Adaptation: how much faster a step size may grow
_MAY_BE_INFINITE = {"growth_rate"}
_RATES = ("lr", "initial_lr", "eps", "weight_decay", "momentum", "dampening", "alpha")
# Flags that say how an optimizer computes, and not what; and which of a schedule-free one's weights the model has
_HOW = {"foreach", "fused", "capturable", "differentiable", "train_mode"}
# Flags of how weights decay
_DECAYS = {"weight_decouple", "decoupled_weight_decay", "fixed_decay"}
# bitsandbytes has a scale for so many numbers, and a map of the values of a byte
_BLOCK, _MAP = 256, 256
# numbers that are looked at at once
_AT_ONCE = 1 << 24


def check_form(content) -> None:
    """Refuse what no optimizer of any kind has written: TypeError or ValueError."""
    if not isinstance(content, dict) or not content:
        raise TypeError(f"a {type(content).__name__}")
    state, groups = content.get("state", {}), content.get("param_groups", [])
    if not isinstance(state, dict):
        raise TypeError("its state is no mapping")
    if "param_groups" in content and not groups:
        raise ValueError("it has no groups of parameters")
    numbered = []
    for group in groups:
        numbered += list(group["params"])
        for name, value in group.items():
            if name != "params":
                _check_setting(name, value)
    # by a text some keep what belongs to no parameter, as MADGRAD its step
    others = {name for name in state if isinstance(name, str)}
    if len(set(numbered)) < len(numbered) or "param_groups" in content and state.keys() - others - set(numbered):
        raise ValueError("its parameters are not those of its groups")
    for number, held in state.items():
        for name, value in _values({number: held} if number in others else held):
            _check_value(f"{name} of parameter {number}", name, value)


def check_schedule_lists(content: dict, groups: int | None) -> None:
    """Refuse a schedule whose rates are no finite numbers, or not as many as the optimizer has groups."""
    for name in ("base_lrs", "_last_lr", "lr_lambdas"):
        values = content.get(name)
        if values is None:
            continue
        if not isinstance(values, list):
            raise TypeError(f"{name} is no list")
        if groups is not None and len(values) != groups:
            raise ValueError(f"{name} has {len(values)} entries, and the optimizer {groups} groups")
        if name != "lr_lambdas" and not all(_is_number(value) and _plain(value) >= 0 for value in values):
            raise ValueError(f"{name} holds what is no learning rate")
    for name in ("last_epoch", "_step_count"):
        if type(content.get(name, 0)) is not int or content.get(name, 0) < 0:
            raise TypeError(f"{name} is no whole number of 0 or more")


def groups_of(trainer) -> tuple[list[list[tuple[str, torch.Size]]], type | None] | None:
    """Return the shapes of a trainer's parameters, a list a group of its optimizer, and the optimizer's class.

    None where an engine spreads them, or where another library makes the groups. The optimizer may be made later.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return None
    if trainer.optimizer is not None:
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        groups = [[(names.get(id(p), ""), p.shape) for p in group["params"]] for group in optimizer.param_groups]
        return groups, type(optimizer)
    args = trainer.args
    if any(kind in str(getattr(args.optim, "value", args.optim)) for kind in ("galore", "apollo", "lomo")):
        return None
    kind = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    if not _is_known(kind[0]):
        return None
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    trained = [(name, p.shape) for name, p in trainer.model.named_parameters() if p.requires_grad]
    return [[p for p in trained if (p[0] in decayed) is first] for first in (True, False)], kind[0]


def misfit(content: dict, groups: Sequence[Sequence[tuple[str, torch.Size]]], kind: type | None) -> str:
    """Say what of an optimizer's state is of another shape than the parameters; empty where nothing is.

    Args:
        content: of the file, of the form that `check_form` takes.
        groups: the names and shapes of the parameters, a list a group.
        kind: the optimizer's class; the shapes of one that is not known here are not compared.
    """
    state, theirs = content.get("state"), content.get("param_groups")
    if state is None or theirs is None:
        return "holds no state and groups of an optimizer"
    counts = [len(group["params"]) for group in theirs]
    if counts != [len(group) for group in groups]:
        return f"has groups of {counts} parameters, and the run of {[len(group) for group in groups]}"
    if not _is_known(kind):
        return ""
    if not kind.__module__.startswith("pytorch_optimizer.") and any(
        1 in (group.get("betas") or ()) for group in theirs
    ):
        return "has a beta of 1, at which its mean would never move"
    for number, (name, shape) in zip(
        (number for group in theirs for number in group["params"]), (p for group in groups for p in group), strict=True
    ):
        held = state.get(number) or {}
        if kind in (torch.optim.Adam, torch.optim.AdamW) and held and (lost := _ADAM - held.keys()):
            return f"has no {min(lost)} of {name}"
        for entry, value in held.items():
            if isinstance(value, torch.Tensor) and not _is_plausible(entry, value.shape, shape):
                return f"has {entry} of shape {list(value.shape)} for {name}, of shape {list(shape)}"
            if entry in _MOMENTS - {"momentum_buffer"} and not isinstance(value, torch.Tensor):
                return f"has {entry} of {name}, which is no tensor"
    return ""


def other_settings(content: dict, optimizer) -> str:
    """Say which setting of a group is of another kind than the run's own optimizer has; empty where none is."""
    for theirs, ours in zip(content["param_groups"], optimizer.param_groups, strict=True):
        for name in theirs.keys() & ours.keys() - {"params"} - _HOW:
            own, value = ours[name], theirs[name]
            if name in _DECAYS and theirs.get("weight_decay") == 0:
                # how a decay is applied that there was not
                continue
            if isinstance(own, bool):
                fits = value is own
            elif _is_number(own):
                fits = _is_number(value)
            elif isinstance(own, tuple | list):
                fits = isinstance(value, tuple | list) and len(value) == len(own)
            else:
                fits = True
            if not fits:
                return f"has {name} {value!r:.100}, and the run {own!r:.100}"
    return ""


def is_finite(tensor: torch.Tensor, nan_alone: bool = False) -> bool:
    """Tell whether all numbers of a tensor are finite, or no NaN; looks at some at a time."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return True
    parts = tensor.detach().reshape(-1).split(_AT_ONCE)
    if nan_alone:
        return not any(bool(part.isnan().any()) for part in parts)
    return all(bool(part.isfinite().all()) for part in parts)


def _is_known(kind: type | None) -> bool:
    if not isinstance(kind, type):
        return False
    module = f"{kind.__module__}."
    # of an elementwise rule each tensor has the shape of its parameter, or is one number
    elementwise = module.startswith("pytorch_optimizer.") and f"pytorch_optimizer:{kind.__name__.lower()}" in SHARDABLE
    return module.startswith(_KNOWN) or elementwise


def _is_plausible(entry: str, shape: torch.Size, own: torch.Size) -> bool:
    numbers = math.prod(own)
    if entry in _MOMENTS:
        # AdEMAMix of bitsandbytes has two of them in one
        return shape == own or shape == (2, *own) and entry in ("state1", "m1_m2")
    if entry.startswith("qmap"):
        return shape == (_MAP,)
    if entry.startswith("absmax"):
        blocks = -(-numbers // _BLOCK)
        return shape in ((blocks,), (2, blocks))
    if len(own) > 1 and entry.endswith(("row", "col", "row_var", "col_var")):
        # Adafactor's, in the forms of transformers and of torch
        row, column = (own[:-1], (*own[:-1], 1)), ((*own[:-2], own[-1]), (*own[:-2], 1, own[-1]))
        return shape in (row if "row" in entry else column)
    return math.prod(shape) == 1 or shape == own or entry == "gnorm_vec" and shape == (100,)


def _check_setting(name: str, value) -> None:
    parts = value if isinstance(value, tuple | list) else [value]
    if name in _MAY_BE_INFINITE and value == math.inf:
        return
    for part in parts:
        if isinstance(part, float | int | torch.Tensor) and not isinstance(part, bool) and not _is_number(part):
            raise ValueError(f"{name} is no finite number")
    if name == "betas" and not (
        isinstance(value, tuple | list) and 2 <= len(value) <= 3 and all(_is_number(b) and 0 <= b <= 1 for b in value)
    ):
        raise ValueError("betas are not two or three numbers from 0 to 1")
    if name in _RATES and value is not None:
        for part in parts:
            if part is not None and not (_is_number(part) and _plain(part) >= 0):
                raise ValueError(f"{name} is no number of 0 or more")


def _check_value(what: str, name: str, value) -> None:
    if isinstance(value, torch.Tensor):
        if type(value) is not torch.Tensor or value.layout != torch.strided:
            # of a library that quantises it
            return
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{what} is larger than its file")
        if not is_finite(value):
            raise ValueError(f"{what} holds numbers that are not finite")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what} is not finite")
    if name == "step" and value is not None and not (_is_number(value) and _plain(value) >= 0):
        raise ValueError(f"{what} is no number of 0 or more")


def _values(held, level: int = 0):
    """Yield the names and values of a parameter's state, of mappings and lists in it too."""
    if level > 8:
        raise ValueError("its state is nested too deep")
    named = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list | tuple) else ()
    for name, value in named:
        if isinstance(value, dict | list | tuple):
            yield from _values(value, level + 1)
        else:
            yield str(name), value


def _is_number(value) -> bool:
    """Tell whether a value is one finite number, or a tensor of one."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex() and math.isfinite(value.item())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # no float holds a larger whole number
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 1000


def _plain(value) -> float:
    return value.item() if isinstance(value, torch.Tensor) else value
