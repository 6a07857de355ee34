"""Where a run's models are loaded: on the one device of each process, and nowhere by a choice of the libraries."""

import contextlib
from collections.abc import Mapping

from torch.distributed.fsdp import FSDPModule

from posttrain.errors import ConfigError
from posttrain.run.engines import under_fsdp

# what spreads a model over all devices that a process sees
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_one_device(args, model) -> None:
    """Refuse one process that sees several devices, of which it would train on one, or copy the model to all.

    A model that its user spreads over them, by `device_map`, is taken.

    Args:
        args: the trainer's config. model: its name, or the model itself.
    """
    if args.n_gpu <= 1 or _is_spread(args, model):
        return
    raise ConfigError(
        f"one process sees {args.n_gpu} GPUs, and trains on one. Set CUDA_VISIBLE_DEVICES=0 in the shell to take one, "
        f"or start a process on each: `posttrain train METHOD --launch ddp --num_processes {args.n_gpu}`, or "
        f"`accelerate launch --num_processes {args.n_gpu}`."
    )


def _is_spread(args, model) -> bool:
    placed = getattr(model, "hf_device_map", None) or {}
    asked = (args.model_init_kwargs or {}).get("device_map") if isinstance(model, str) else None
    if isinstance(asked, Mapping):
        placed = asked
    return asked in _SPREADS if isinstance(asked, str) else len(set(placed.values())) > 1


def check_placed_in_time(args, policy_is_reference: bool) -> None:
    """Refuse to forward the policy before training under FSDP, which places it no sooner.

    Args:
        args: the trainer's config.
        policy_is_reference: whether the reference is the policy itself, with its adapter off or replaced.
    """
    if under_fsdp(args) and policy_is_reference and getattr(args, "precompute_ref_log_probs", False):
        raise ConfigError(
            "precompute_ref_log_probs is true under FSDP, and the reference is the policy without its adapter, which "
            "FSDP places when training begins. Set `precompute_ref_log_probs: false`, or launch with DDP or ZeRO "
            "(configs/accelerate/ddp.yaml, zero2.yaml, zero3.yaml)."
        )


def check_is_placed(trainer) -> None:
    """Refuse to evaluate a model under FSDP2 before training, which places it."""
    if getattr(trainer.accelerator, "is_fsdp2", False) and not isinstance(trainer.model, FSDPModule):
        raise ConfigError(
            "an evaluation came before training under FSDP, which places the model when training begins. Call train() "
            "first, set `eval_on_start: true`, or launch with DDP or ZeRO (configs/accelerate/ddp.yaml, zero3.yaml)."
        )


def name_device(args) -> None:
    """Name the device that TRL loads models on, where nobody did: it would spread them over all that are visible."""
    kwargs = args.model_init_kwargs or {}
    # TRL names none there itself
    if kwargs.get("device_map") is not None or args.device.type in ("cpu", "mps"):
        return
    # of several processes each places its own
    place = {"": str(args.device)} if args.world_size == 1 else None
    args.model_init_kwargs = kwargs | {"device_map": place}


@contextlib.contextmanager
def named(args, model):
    """Have TRL's constructor load models on the device of this process; the settings are as before afterwards.

    Of a model that is given, TRL loads the reference alone, and warns of names of loading that come too early:
    `name_device` is then called once the accelerator is made.
    """
    before = args.model_init_kwargs
    if isinstance(model, str):
        name_device(args)
    try:
        yield
    finally:
        args.model_init_kwargs = before
