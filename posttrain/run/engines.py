"""Which engine spreads a run's weights and optimizer state, as its training arguments and the launch say."""

import os


def under_deepspeed(args) -> bool:
    """Return whether a run with these training arguments goes through DeepSpeed."""
    return bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def under_fsdp(args) -> bool:
    """Return whether a run with these training arguments goes through FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def sharding(args) -> str | None:
    """Name the engine that gives an optimizer flat or cut parameters; None under plain DDP or one process."""
    return "DeepSpeed ZeRO" if under_deepspeed(args) else "FSDP" if under_fsdp(args) else None


def deepspeed_settings(args) -> dict:
    """Return the DeepSpeed config of a run whose training arguments are resolved; empty without one."""
    plugin = getattr(args, "deepspeed_plugin", None)
    found = getattr(plugin, "deepspeed_config", None)
    return found if isinstance(found, dict) else {}
