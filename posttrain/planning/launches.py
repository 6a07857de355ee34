"""A launch file of accelerate, read as a plan needs it."""

import errno
import json
from pathlib import Path

import yaml

from posttrain import yaml_text
from posttrain.checks import shorten
from posttrain.errors import ConfigError
from posttrain.planning.job import Launch

_MOST_CARDS = 100_000


def read(path: str | Path, processes: int | None = None, machines: int | None = None) -> Launch:
    """Return what a launch file says of cards, with other numbers of processes and machines where they are given.

    Raises ConfigError for a file that cannot be read, is no launch file, or names what no plan knows.
    """
    try:
        file = yaml_text.load(yaml_text.read(path).decode())
    except OSError as error:
        raise ConfigError(f"the launch file {path} cannot be read: {error.strerror}.") from None
    except (ValueError, yaml.YAMLError, RecursionError):
        raise ConfigError(f"the launch file {path} is no YAML that can be read.") from None
    parts = file if isinstance(file, dict) else {}
    engine, sharded = (parts.get(f"{name}_config") or {} for name in ("deepspeed", "fsdp"))
    if not (isinstance(engine, dict) and isinstance(sharded, dict) and "distributed_type" in parts):
        raise ConfigError(f"{path} is no launch file of accelerate, which names a distributed_type.")
    named, stage = file["distributed_type"], engine.get("zero_stage", 2)
    if named is False:
        # what YAML makes of NO without quotes
        named = "NO"
    mixed = _choice(path, "mixed_precision", file.get("mixed_precision", "no"), ("no", "bf16", "fp16")) != "no"
    if "deepspeed_config_file" in engine:
        engine, stage, mixed = _of_deepspeed(path, engine["deepspeed_config_file"])
    kinds = {"NO": "single", "MULTI_GPU": "ddp", "FSDP": "fsdp2", "DEEPSPEED": "zero"}
    kind = kinds.get(str(named).strip('"').upper())
    if kind is None:
        raise ConfigError(
            f"{path}: a plan knows no distributed_type {shorten(named)}; it knows 'NO', MULTI_GPU, FSDP and DEEPSPEED, "
            "all on accelerators."
        )
    if kind == "fsdp2":
        _check_whole_sharding(path, sharded)
    if kind == "zero":
        kind = "zero" + _choice(path, "ZeRO's stage", stage, ("2", "3"))
    whole = (
        _choice(path, "fsdp_offload_params", sharded.get("fsdp_offload_params"), ("true", "false", "none")) == "true"
    )
    devices = ("none", "cpu", "nvme")
    off = {
        part: _choice(path, f"offload_{part}_device", engine.get(f"offload_{part}_device"), devices) != "none"
        for part in ("optimizer", "param")
    }
    return of(
        kind,
        file.get("num_processes", 1) if processes is None else processes,
        file.get("num_machines", 1) if machines is None else machines,
        mixed=mixed,
        offloads_states=whole or off["optimizer"],
        offloads_weights=whole or off["param"],
    )


def _choice(path: str | Path, name: str, value, known: tuple[str, ...]) -> str:
    """Return a value as accelerate reads it, by its text in small letters. Raises ConfigError for one not known."""
    text = "no" if value is False and "no" in known else str(value).strip().lower()
    if text not in known:
        raise ConfigError(f"{path}: {name} is {shorten(value)}; a plan knows {', '.join(known)}.")
    return text


def _of_deepspeed(path: str | Path, named) -> tuple[dict, object, bool]:
    """Return what a DeepSpeed config that a launch file names says, in a launch file's own words: settings, the stage,
    and whether it computes in half precision.
    """
    try:
        beside = Path(path).parent / str(named)
        source = beside if beside.is_file() else Path(str(named))
        if not source.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file")
        content = json.loads(yaml_text.read(source))
        zero = content.get("zero_optimization") or {}
        found = {
            f"{part}_device": (zero.get(part) or {}).get("device", "none")
            for part in ("offload_optimizer", "offload_param")
        }
        half = any((content.get(name) or {}).get("enabled") is True for name in ("bf16", "fp16"))
        return found, zero.get("stage", 0), half
    except OSError as error:
        raise ConfigError(f"{path}: deepspeed_config_file {shorten(named)} cannot be read: {error.strerror}.") from None
    except (ValueError, AttributeError, RecursionError, yaml.YAMLError):
        raise ConfigError(
            f"{path}: deepspeed_config_file {shorten(named)} is no DeepSpeed config that can be read."
        ) from None


def _check_whole_sharding(path: str | Path, sharded: dict) -> None:
    """Refuse what FSDP does otherwise than a plan computes: weights, gradients and states are cut over all cards."""
    for name, planned in (("fsdp_version", "2"), ("fsdp_reshard_after_forward", "true")):
        value = str(sharded.get(name, planned)).lower()
        if value not in (planned, "full_shard"):
            raise ConfigError(f"{path}: {name} is {sharded[name]}; a plan knows {planned} alone.")


def of(kind: str, processes, machines, **given) -> Launch:
    """Return a launch over so many cards. Raises ConfigError where the numbers do not fit each other or the kind."""
    for name, value in (("gpus", processes), ("nodes", machines)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_CARDS:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1 to {_MOST_CARDS:,}.")
    if processes % machines:
        raise ConfigError(f"gpus is {processes} in all on {machines} nodes, which is no whole number a node.")
    if kind == "single" and processes > 1:
        raise ConfigError(f"gpus is {processes} with a launch of one process. Choose `--launch ddp`, zero2 or zero3.")
    return Launch(kind, processes, machines, **given)
