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
