"""A LoRA that is refactored while it trains: A orthonormal again every so many steps, the model unchanged.

With A' = N A and B' = B N^-1 gradients become g_A' = N^-T g_A and g_B' = g_B N^T, and so do their running means, which
is exact. Adam's running mean of squares has no exact form in the new factors, as it does not know how the rows of a
gradient vary together; it is estimated.
"""

import os
from typing import NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor
from transformers import TrainerCallback

from posttrain.checks import check_choice, check_integer
from posttrain.errors import ConfigError, DataError, DivergedError
from posttrain.log import get_logger
from posttrain.objectives import low_rank

SECOND_MOMENTS = ("estimate", "refuse")
_OPTIMIZERS = "sgd, adamw_torch and adamw_torch_fused (torch.optim.SGD, Adam and AdamW)"
_HF_NAMES = ("sgd", "adamw_torch", "adamw_torch_fused")
# states of those optimizers that are linear in the gradient
_MEANS = ("momentum_buffer", "exp_avg")
_SQUARES = "exp_avg_sq"


class Factors(NamedTuple):
    """The parameters of one layer's adapter: A (r, d_in) and B (d_out, r)."""

    path: str
    A: torch.nn.Parameter
    B: torch.nn.Parameter


class RefactorCallback(TrainerCallback):
    """Refactors the LoRA of any `transformers.Trainer` after every so many optimiser steps; A becomes orthonormal.

    The model's function, the scale of each layer and the running means of SGD and Adam stay what they are, in the new
    factors; Adam's second moments are estimated. Nothing but the number of steps decides when, so a run that resumes
    goes on with the same numbers, and ranks of DDP take what the first one computed.

    Args:
        every: optimiser steps, 1 or more.
        second_moment: what is done about Adam's second moments: estimate, or refuse such an optimizer.
        adapter: its name.

    Raises:
        ConfigError: at construction, a value out of range; when training begins, an optimizer, engine or adapter that
            it has no meaning for.
        DivergedError: factors that are not finite any more.
    """

    def __init__(self, every: int, second_moment: str = "estimate", adapter: str = "default") -> None:
        self.every = check_integer("every", every, 1)
        check_choice("second_moment", second_moment, SECOND_MOMENTS)
        self.second_moment, self.adapter, self._said = second_moment, adapter, False

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        check_engine(args)
        check_optimizer(optimizer, self.second_moment)
        factors_of(model, self.adapter)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step % self.every:
            return
        try:
            left_out = refactor_adapter(model, optimizer, self.adapter, self.second_moment)
        except DataError as error:
            raise DivergedError(
                f"refactor_every: after step {state.global_step} the adapter cannot be refactored: {error} A lower "
                "learning_rate usually helps."
            ) from error
        if left_out and not self._said:
            self._said = True
            get_logger().warning(
                "refactor_every: step %d left %d layers as they are, whose A has rows that depend on each other, as %s",
                state.global_step, len(left_out), left_out[0],
            )  # fmt: skip


@torch.no_grad()
def refactor_adapter(model, optimizer=None, adapter: str = "default", second_moment: str = "estimate") -> list[str]:
    """Refactor each layer of a model's LoRA in place, and an optimizer's state with it; all ranks call it.

    Layers whose A has no full row rank have no change of basis for the optimizer's state, and stay as they are.

    Args:
        model: with a LoRA of fp32 or fp64 numbers. optimizer: one that trains it, between two steps; or None.
        adapter: its name. second_moment: as in `RefactorCallback`.

    Returns:
        the paths of the layers that stay as they are.

    Raises:
        ConfigError: an optimizer or an adapter that it has no meaning for.
        DataError: numbers that are not finite.
    """
    optimizer = _innermost(optimizer)
    check_optimizer(optimizer, second_moment)
    found, left_out = factors_of(model, adapter), []
    for path, A, B in found:
        try:
            made_a, made_b, to, back = _shared(A, B)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if to is None:
            left_out.append(path)
            continue
        A.copy_(made_a)
        B.copy_(made_b)
        _turn(optimizer, A, back.T)
        _turn(optimizer, B, to, transposed=True)
    return left_out


def second_moment_estimate(squares: Tensor, turn: Tensor) -> Tensor:
    """Estimate the running mean of squares of rows M g from that of the rows g.

    v'_ij = sum_k M_ik^2 v_kj: exact where the rows' entries vary independently around zero, or where each row of M has
    one entry; never negative.

    Args:
        squares: v (r, d), of one column of g at a time. turn: M (r, r).
    """
    return turn.square() @ squares


def check_engine(args) -> None:
    """Raise ConfigError under DeepSpeed and FSDP, whose optimizers hold copies or parts of the weights."""
    for name, variable, setting in (
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED", "deepspeed"),
        ("FSDP", "ACCELERATE_USE_FSDP", "fsdp"),
    ):
        if getattr(args, setting, None) or os.environ.get(variable, "false").lower() == "true":
            raise ConfigError(
                f"refactor_every under {name}, whose optimizer holds copies or parts of the weights and of their "
                "moments: they would not follow. Use DDP or one process, or leave refactor_every out."
            )


def check_name(optim: str, second_moment: str) -> None:
    """Raise ConfigError for an optimizer by its name in transformers that cannot follow; others are for later."""
    from transformers.training_args import OptimizerNames

    if optim in {one.value for one in OptimizerNames} - set(_HF_NAMES):
        _refuse(f"optim is {optim}")
    if optim.startswith("adamw") and second_moment == "refuse":
        _refuse_squares(optim)


def check_optimizer(optimizer, second_moment: str = "estimate") -> None:
    """Raise ConfigError for an optimizer whose state cannot be written in other factors; None has none."""
    optimizer = _innermost(optimizer)
    if optimizer is None:
        return
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        _refuse(f"the optimizer is {kind.__module__}.{kind.__name__}")
    if kind is not torch.optim.SGD and second_moment == "refuse":
        _refuse_squares(kind.__name__)
    for group in getattr(optimizer, "param_groups", ()):
        if group.get("amsgrad"):
            _refuse("the optimizer keeps the largest second moments (amsgrad)")
        mixed = group.get("momentum") or kind is torch.optim.Adam and not group.get("decoupled_weight_decay")
        if group.get("weight_decay") and mixed:
            raise ConfigError(
                f"refactor_every with the weight_decay {group['weight_decay']:g} of {kind.__name__}, which goes into "
                "its running means of gradients and changes otherwise than these. Set `weight_decay: 0`, or use "
                "adamw_torch, whose decay is apart."
            )


def _refuse(found: str) -> None:
    raise ConfigError(
        f"refactor_every: {found}, whose state cannot be written in the new factors. Those that work are {_OPTIMIZERS}."
    )


def _refuse_squares(optim: str) -> None:
    raise ConfigError(
        f"refactor_second_moment is refuse and the optimizer is {optim}, which has second moments: they are known in "
        "the old factors alone. Use sgd, or set `refactor_second_moment: estimate`."
    )


def check_adapter_config(config) -> None:
    """Raise ConfigError for an adapter, by its config, that is no LoRA, or a scheme of ours that fixes its factors."""
    kind = getattr(getattr(config, "peft_type", None), "value", None)
    if kind != "LORA":
        found = "no adapter is trained" if kind is None else f"the adapter is of the type {kind}"
        raise ConfigError(f"refactor_every is for a LoRA, and {found}. Leave refactor_every out.")
    if hasattr(config, "scheme") and not getattr(config, "may_be_refactored", False):
        form = f" of the form {config.form}" if hasattr(config, "form") else ""
        raise ConfigError(
            f"refactor_every with an adapter of the scheme {config.scheme.split()[0]}{form}, which fixes its factors "
            "or how they move: in others it would be another one. Leave refactor_every out, or use adapter: lora."
        )
    if getattr(config, "use_dora", False):
        raise ConfigError(
            "refactor_every with use_dora, whose magnitudes train beside the factors. Leave one of them out."
        )
    if getattr(config, "target_parameters", None):
        raise ConfigError(
            "refactor_every with target_parameters, whose factors are of several experts in one. Leave one of them out."
        )


def factors_of(model, adapter: str = "default") -> list[Factors]:
    """Return the factors of each layer of a LoRA, in the model's order.

    Raises ConfigError where there are none, or some that cannot be refactored while they train.
    """
    found, seen = [], set()
    if adapter in (configs := getattr(model, "peft_config", None) or {}):
        check_adapter_config(configs[adapter])
    may = getattr(configs.get(adapter), "may_be_refactored", False)
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in {*layer.lora_A, *layer.lora_embedding_A}:
            continue
        of_embedding = adapter in layer.lora_embedding_A
        A, B = (
            (layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter])
            if of_embedding
            else (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
        )
        reason = None
        if isinstance(layer, ParamWrapper) or A.dim() != 2 or B.dim() != 2:
            reason = "its factors are no two matrices of one layer"
        elif adapter in layer.lora_variant and not may:
            reason = f"it is no plain LoRA ({type(layer.lora_variant[adapter]).__name__})"
        elif any(hasattr(p, "ds_id") or type(p.data) is not Tensor for p in (A, B)):
            reason = "this process holds a part of its factors alone"
        elif not (A.requires_grad and B.requires_grad):
            reason = "one of its factors is frozen"
        elif any(p.dtype not in (torch.float32, torch.float64) for p in (A, B)):
            reason = f"its factors are of {A.dtype}, which would round the model at each refactorisation"
        elif A.size(1) < A.size(0):
            reason = f"of its {A.size(1)} inputs no {A.size(0)} rows (its rank) are orthonormal"
        elif seen & {id(A), id(B)}:
            reason = "it shares its factors with another layer"
        if reason:
            on_4_bits = "" if A.dtype != torch.bfloat16 else " TRL casts adapters on a base of 4 or 8 bits to bfloat16."
            raise ConfigError(
                f"refactor_every: {path} cannot be refactored, as {reason}.{on_4_bits} Leave refactor_every out."
            )
        seen |= {id(A), id(B)}
        found.append(Factors(path, A, B))
    if not found:
        raise ConfigError(f"refactor_every: the model has no LoRA of the name {adapter!r}. Leave refactor_every out.")
    return found


def _shared(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Refactor a layer; on several ranks as the first one does, whose last bits need not be another's."""
    # Apple's devices have no fp64
    precision = torch.float32 if A.device.type == "mps" else torch.float64
    made = low_rank.refactored(A, B, precision=precision)
    if not _are_several():
        return made
    nothing = made.A.new_zeros(A.size(0), A.size(0), dtype=precision)
    parts = [part if part is not None else nothing.clone() for part in made]
    for part in parts:
        torch.distributed.broadcast(part, 0)
    return (*parts[:2], *parts[2:]) if parts[2].any() else (*parts[:2], None, None)


def _turn(optimizer, parameter: Tensor, turn: Tensor, transposed: bool = False) -> None:
    """Write a parameter's running means for gradients M g, and on several ranks those of the first one.

    `turn`: M (r, r), on the rows of A or, transposed, the columns of B.
    """
    state = optimizer.state[parameter] if optimizer is not None and parameter in optimizer.state else {}
    for name, value in state.items():
        if name not in (*_MEANS, _SQUARES) or value is None:
            continue
        rows = (value.T if transposed else value).to(turn.dtype)
        rows = second_moment_estimate(rows, turn) if name == _SQUARES else turn @ rows
        value.copy_(rows.T if transposed else rows)
        if _are_several():
            torch.distributed.broadcast(value, 0)


def _are_several() -> bool:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def _innermost(optimizer):
    while not isinstance(optimizer, type) and isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer
