"""Which engine spreads a run's weights and optimizer state, as its training arguments and the launch say."""

import contextlib
import os
from collections.abc import Iterator

_SWITCHES = {"zero2": "ACCELERATE_USE_DEEPSPEED", "zero3": "ACCELERATE_USE_DEEPSPEED", "fsdp2": "ACCELERATE_USE_FSDP"}
_supposed = False


def under_deepspeed(args) -> bool:
    """Return whether a run with these training arguments goes through DeepSpeed."""
    return bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def under_fsdp(args) -> bool:
    """Return whether a run with these training arguments goes through FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def sharding(args) -> str | None:
    """Name the engine that gives an optimizer flat or cut parameters; None under plain DDP or one process."""
    return "DeepSpeed ZeRO" if under_deepspeed(args) else "FSDP" if under_fsdp(args) else None


@contextlib.contextmanager
def supposed(kind: str) -> Iterator[None]:
    """Have settings be checked as under a launch that is not this process's: single, ddp, zero2, zero3 or fsdp2."""
    global _supposed
    before = {name: os.environ.pop(name, None) for name in set(_SWITCHES.values())}
    if kind in _SWITCHES:
        os.environ[_SWITCHES[kind]] = "true"
    _supposed = True
    try:
        yield
    finally:
        _supposed = False
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def is_supposed() -> bool:
    """Return whether settings are checked for a launch that is not this process's, nor on its machine."""
    return _supposed


def add_up_in_fp32(plugin) -> None:
    """Have ZeRO-2 and ZeRO-3 add up the gradients of a step's micro-batches in fp32, where nothing else is asked for.

    In bf16, DeepSpeed's own choice there, each sum is rounded to 8 bits. `plugin`: accelerate's.
    """
    settings = plugin.deepspeed_config
    if plugin.zero_stage in (2, 3) and settings.get("bf16", {}).get("enabled") is True:
        settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def deepspeed_settings(args) -> dict:
    """Return the DeepSpeed config of a run whose training arguments are resolved; empty without one."""
    plugin = getattr(args, "deepspeed_plugin", None)
    found = getattr(plugin, "deepspeed_config", None)
    return found if isinstance(found, dict) else {}
