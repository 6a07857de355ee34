"""Facts about the machine and the versions of libraries."""

import functools
import subprocess
from importlib.metadata import PackageNotFoundError, version

TESTED = {
    "torch": ("2.13.0",),
    "transformers": ("5.23.0",),
    "trl": ("1.16.0",),
    "peft": ("0.21.2",),
    "accelerate": ("1.15.0",),
    "datasets": ("5.2.0",),
    "deepspeed": ("0.19.8",),
    "bitsandbytes": ("0.50.2",),
}

_LIBRARIES = "posttrain torch transformers trl peft accelerate datasets deepspeed bitsandbytes".split()


def library_versions() -> dict[str, str]:
    """Return the versions of this library and of those it stands on, where installed."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name == "posttrain":
                from posttrain import __version__

                found[name] = __version__
    return found


def device_name(device) -> str:
    """Describe a torch device in words: its type and, for an accelerator, the card's name."""
    import torch

    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return device.type


def git_commit() -> str | None:
    """Return the commit checked out in the working folder, with `-dirty` where files differ; None outside a
    checkout."""
    try:
        described = subprocess.run(
            # a folder of someone else's may configure a program that watches its files
            ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
