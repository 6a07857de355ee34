"""What `model_init_kwargs` may hold: names of loading, and fields of the model's config that leave its weights."""

import copy

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers import AutoQuantizationConfig

from posttrain.errors import ConfigError, PosttrainError
from posttrain.run import checks
from posttrain.visible import one_line

# Not among them: what would read other files than the model's own, write some, or return something else than a model
LOADING = frozenset(
    """
    attn_implementation cache_dir code_revision device_map disable_mmap dtype experts_implementation force_download
    key_mapping local_files_only low_cpu_mem_usage max_memory proxies quantization_config revision token torch_dtype
    trust_remote_code use_kernels use_safetensors
    """.split()
)
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
        if not isinstance(name, str) or name.startswith("_") or name not in config.to_dict():
            raise ConfigError(
                f"model_init_kwargs names {one_line(repr(name))}, which neither a run's loading takes nor the model's "
                f"config ({type(config).__name__}) has. Correct it, or leave it out."
            )
    if fields:
        _check_fields(fields, config)


def _check_values(kwargs: dict) -> None:
    if kwargs.get("use_safetensors") not in (None, True):
        raise ConfigError(
            f"model_init_kwargs: use_safetensors is {kwargs['use_safetensors']!r}, and weights are loaded from "
            "safetensors alone. Leave it out."
        )
    places = kwargs.get("device_map")
    for place in places.values() if isinstance(places, dict) else [places]:
        if place in _AWAY:
            raise ConfigError(
                f"model_init_kwargs: device_map puts weights on {place!r}, where they cannot be trained. Name devices "
                "that hold them, or leave it out."
            )
    quantised = kwargs.get("quantization_config")
    if isinstance(quantised, dict):
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
