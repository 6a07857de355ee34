"""What the config of a saved LoRA adapter says: whether it can be read, rank and scale of a module, what has no sum."""

import math

from posttrain import model_sizes
from posttrain.checks import is_beyond_floats, shorten
from posttrain.errors import ConfigError
from posttrain.visible import one_line

# of PEFT, for both r and lora_alpha
_DEFAULT = 8
# of an alpha, which over any rank is still a number of fp64
_LEAST = 1e-290
_WIDE = "it is another function of its inputs than B A"
# of an adapter's config: what has no sum, or no factors, its neutral values beside None, and why
_REFUSED = {
    "bias": (("none",), "it trains biases of the base itself"),
    "modules_to_save": (([],), "it trains whole modules, which are no product of two factors"),
    "trainable_token_indices": (([], {}), "it trains rows of an embedding, which are no product of two factors"),
    "target_parameters": (([],), "fused experts are tensors of three dimensions"),
    "layer_replication": (([],), "it repeats layers of the base"),
    "lora_bias": ((False,), "its B has a bias"),
    "use_dora": ((False,), "DoRA scales what base and adapter make together, so that changes do not add up"),
    "use_qalora": ((False,), _WIDE),
    "ensure_weight_tying": ((False,), "two of its layers share their factors"),
    "alora_invocation_tokens": (([],), "it acts behind the tokens that invoke it alone"),
    "use_bdlora": ((False,), _WIDE),
    "arrow_config": ((), _WIDE),
    "kasa_config": ((), _WIDE),
    "monteclora_config": ((), _WIDE),
    "megatron_config": ((), "it is for layers of Megatron"),
    "velora_config": ((), "it keeps what its backward pass needs beside A and B"),
}
# what leaves the product of A and B as it is, or is read here or by PEFT as it is written: whose, where, its start, how
# it was trained
_TAKEN = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "lora_dropout",
    # of no effect without the setting that they belong to, and of where a layer computes
    "qalora_group_size", "megatron_core", "runtime_config",
}  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def check(config: dict, owner: str) -> None:
    """Raise ConfigError for a config that is of another kind of adapter, or has values of other types."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{owner} is of the type {shorten(kind)}; it must be LORA, whose factors are A and B.")
    model_sizes.check_sizes(config, owner)
    faults = {}
    for name, pattern, fits, wanted in (
        ("r", "rank_pattern", _is_rank, "a whole number of 1 or more"),
        ("lora_alpha", "alpha_pattern", _is_alpha, f"a finite number, and not below {_LEAST:g} in size but for 0"),
    ):
        held = config.get(pattern) or {}
        if not fits(config.get(name, _DEFAULT)):
            faults[name] = wanted
        if not isinstance(held, dict) or not all(map(fits, held.values())):
            faults[pattern] = f"a mapping, each value {wanted}"
    for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if not isinstance(config.get(name), bool | None):
            faults[name] = "true or false"
    for name in ("base_model_name_or_path", "revision", "task_type"):
        if not isinstance(config.get(name), str | None):
            faults[name] = "a text"
    for name in ("target_modules", "exclude_modules"):
        value = config.get(name)
        if not isinstance(value, str | None) and not (isinstance(value, list) and _are_texts(value)):
            faults[name] = "a text or a list of texts"
    layers = config.get("layers_to_transform")
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in _listed(layers)):
        faults["layers_to_transform"] = "a whole number or a list of them"
    if not _are_texts(_listed(config.get("layers_pattern"))):
        faults["layers_pattern"] = "a text or a list of texts"
    for name, wanted in faults.items():
        raise ConfigError(f"{owner}: {name} is {shorten(config.get(name))}; it must be {wanted}.")


def _listed(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_rank(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= model_sizes.WIDEST


def _is_alpha(value) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and not is_beyond_floats(value)
    return number and math.isfinite(value) and (value == 0 or abs(value) >= _LEAST)


def _are_texts(values: list) -> bool:
    return all(isinstance(one, str) for one in values)


def refusals(config: dict) -> list[str]:
    """Return why an adapter of this config cannot be added to others or truncated, a reason each."""
    found = [
        f"{name} is {shorten(config[name])}, and {why}"
        for name, (neutral, why) in _REFUSED.items()
        if config.get(name) is not None and config[name] not in neutral
    ]
    found += _unknown(config)
    how = config.get("init_lora_weights")
    if isinstance(how, str) and how.lower().startswith(_CHANGES_BASE):
        found.append(
            f"init_lora_weights is {how!r}, and it fits the base without the part that the adapter took when it was "
            "made. Convert it first: PEFT's save_pretrained with path_initial_model_for_weight_conversion"
        )
    return found


def _unknown(config: dict) -> list[str]:
    """Return why settings cannot be taken that PEFT has and this module does not know, or that this PEFT has not."""
    import peft

    others = {name: value for name, value in config.items() if name not in _TAKEN | _REFUSED.keys()}
    if not others:
        return []
    defaults, found = peft.LoraConfig().to_dict(), []
    for name, value in others.items():
        # of a setting that is off, whatever it is
        if not value or name in defaults and value == defaults[name]:
            continue
        whose = "this library does not know" if name in defaults else f"PEFT {peft.__version__} does not have"
        found.append(
            f"{one_line(name)[:100]} is {shorten(value)}, a setting that {whose}: what it makes of A and B is not "
            "known. If that is nothing, take it out of the adapter's config"
        )
    return found


def rank_and_scale(config: dict, path: str) -> tuple[int, float]:
    """Return the rank of a module and its scale, alpha / r or alpha / sqrt(r), as PEFT has them of its config.

    `config`: one that `check` takes. `path`: of the module in the base model.
    """
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks, path), config.get("r", _DEFAULT))
    alpha = alphas.get(get_pattern_key(alphas, path), config.get("lora_alpha", _DEFAULT))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
