"""What `model_init_kwargs` may hold: names of loading, and fields of the model's config that leave its weights."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from posttrain.errors import ConfigError, PosttrainError
from posttrain.run import checks
from posttrain.visible import one_line

# Not among them: what would read other files than the model's own, write some, or return something else than a model
_TEXT, _TRUTH, _MAPPING = (str,), (bool,), (Mapping,)
LOADING = {
    "attn_implementation": (str, Mapping), "cache_dir": (str, Path), "code_revision": _TEXT,
    "device_map": (str, int, torch.device, Mapping), "disable_mmap": _TRUTH, "dtype": (str, torch.dtype, Mapping),
    "experts_implementation": (str, Mapping), "force_download": _TRUTH, "key_mapping": _MAPPING,
    "local_files_only": _TRUTH, "low_cpu_mem_usage": _TRUTH, "max_memory": _MAPPING, "proxies": _MAPPING,
    "quantization_config": (Mapping, QuantizationConfigMixin), "revision": _TEXT, "token": (str, bool),
    "torch_dtype": (str, torch.dtype, Mapping), "trust_remote_code": _TRUTH, "use_kernels": _TRUTH,
    "use_safetensors": _TRUTH,
}  # fmt: skip
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
# Places of weights that cannot be trained
_AWAY = ("disk", "meta")


def check(args, config) -> None:
    """Refuse what a run does not load a model with, or could not; asked by a trainer and by a dry run alike.

    Args:
        args: the trainer's config. With `trust_remote_code`, the model's own code may take any name.
        config: the model's, as it is on disk.

    Raises:
        ConfigError: a name that is none of `LOADING` and no field of the config, or a value that cannot be.
    """
    kwargs = args.model_init_kwargs
    if not isinstance(kwargs, dict):
        return
    _check_values(kwargs)
    if args.trust_remote_code:
        return
    fields = {name: value for name, value in kwargs.items() if name not in LOADING}
    for name in fields:
        if name not in config.to_dict() and name not in config.attribute_map:
            raise ConfigError(
                f"model_init_kwargs names {one_line(repr(name))}, which neither a run's loading takes nor the model's "
                f"config ({type(config).__name__}) has. Correct it, or leave it out."
            )
    if fields:
        _check_fields(fields, config)


def _check_values(kwargs: dict) -> None:
    for name, kinds in LOADING.items():
        value = kwargs.get(name)
        if value is not None and not isinstance(value, kinds):
            allowed = " or ".join(kind.__name__.lower() for kind in kinds)
            raise ConfigError(f"model_init_kwargs: {name} is {one_line(repr(value))}; it must be a {allowed}.")
    if kwargs.get("use_safetensors") is False:
        raise ConfigError(
            "model_init_kwargs: use_safetensors is false, and weights are loaded from safetensors alone. Leave it out."
        )
    places = kwargs.get("device_map")
    for place in places.values() if isinstance(places, Mapping) else [places]:
        if isinstance(place, str) and place not in (*_SPREAD, *_AWAY):
            with _answered("device_map"):
                torch.device(place)
        if str(place) in _AWAY:
            raise ConfigError(
                f"model_init_kwargs: device_map puts weights on {place!r}, where they cannot be trained. Name devices "
                "that hold them, or leave it out."
            )
    for size in (kwargs.get("max_memory") or {}).values():
        with _answered("max_memory"):
            convert_file_size_to_int(size)
    quantised = kwargs.get("quantization_config")
    if isinstance(quantised, Mapping):
        with _answered("quantization_config"):
            AutoQuantizationConfig.from_dict(dict(quantised))


def _check_fields(fields: dict, config) -> None:
    """Refuse fields of the config that it does not take, or by which the model would have other weights."""
    named = ", ".join(map(one_line, fields))
    with _answered(named):
        changed = type(config).from_dict(config.to_dict() | fields)
    # within the launch, building would spread the weights
    if is_deepspeed_zero3_enabled():
        return
    try:
        before = _shapes(config)
    except PosttrainError:
        raise
    # a model of another kind, which the trainer's own checks name
    except Exception:
        return
    with _answered(named):
        after = _shapes(changed)
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if differing:
        raise ConfigError(
            f"model_init_kwargs sets {named}, with which the model would have other weights than its files hold "
            f"({len(differing)} tensors, {one_line(differing[0])} among them). Leave it out."
        )


def _shapes(config) -> dict[str, tuple]:
    with torch.random.fork_rng(devices=[]), torch.device("meta"), checks.building("the model"):
        # the config's own attention may be a kernel of the hub
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


class _answered:
    """Raise ConfigError for whatever upstream raises inside over values of these names."""

    def __init__(self, names: str) -> None:
        self._names = names

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, Exception) and not isinstance(error, PosttrainError):
            reason = one_line(" ".join(str(error).split()) or kind.__name__)[:300]
            raise ConfigError(f"model_init_kwargs: {self._names} cannot be taken: {reason}") from error


def is_quantised(args, config) -> bool:
    """Tell whether a model is quantised by bitsandbytes, or is going to be, as far as a run's settings tell.

    Adapters on such a base become bf16: TRL casts them.

    Args:
        args: the trainer's config. config: the model's.
    """
    given = (args.model_init_kwargs or {}).get("quantization_config")
    # a recipe's settings, which its trainer is given apart
    places = (getattr(args, "model_settings", None), given, getattr(config, "quantization_config", None))
    return any(_reads(one, "load_in_4bit") or _reads(one, "load_in_8bit") for one in places)


def _reads(holder, name: str) -> bool:
    return bool(holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, False))
