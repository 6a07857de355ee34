"""Checks of an adapter's config before the model loads: what PEFT would only trip over, or never train."""

import copy
import math
import re

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled

from posttrain import patterns
from posttrain.checks import check_holdable, plain, shorten
from posttrain.errors import ConfigError
from posttrain.run.checks import building, upstream_refusals

# What architectures call their input embedding
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
# Of an adapter's config what names modules: by texts or a pattern, and by texts alone.
_NAMES = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
_LISTS_OF_NAMES = ("modules_to_save", "target_parameters")


def check_lora(peft_config) -> None:
    """Refuse adapter settings that upstream would only trip over once the model is loaded.

    Patterns that may take for ever to match are refused as well. Numpy's numbers become Python's own in the settings,
    as PEFT saves no others.
    """
    vars(peft_config).update(plain(vars(peft_config)))
    for name, value in vars(peft_config).items():
        check_holdable(f"{name} of the adapter", value)
    for name in (*_NAMES, *_LISTS_OF_NAMES):
        _check_module_names(name, getattr(peft_config, name, None), name in _NAMES)
    patterns.check_adapter(peft_config)
    # of other kinds `r` may be something else: OFT takes 0 beside its block size
    if isinstance(peft_config, LoraConfig):
        rank, dropout, alpha = peft_config.r, peft_config.lora_dropout, peft_config.lora_alpha
        if not (isinstance(rank, int) and rank >= 1):
            raise ConfigError(f"the LoRA rank (lora_r) is {rank}; it must be a whole number of 1 or more.")
        if dropout is not None and not 0 <= dropout < 1:
            raise ConfigError(f"lora_dropout is {dropout}; it must lie in [0, 1).")
        if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise ConfigError(
                f"lora_alpha is {alpha}; it must be a number above 0 (at 0 the adapter would never train)."
            )
    targets = getattr(peft_config, "target_modules", None) or ()
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        raise ConfigError(
            "lora_target_modules names lm_head, whose weight is read directly, so an adapter on it would never train. "
            "Leave it out."
        )


def _check_module_names(name: str, value, takes_text: bool) -> None:
    """Refuse what names no modules in an adapter's config. `takes_text`: whether one text or pattern is taken too."""
    several = isinstance(value, list | tuple | set | frozenset) and all(isinstance(one, str) for one in value)
    if value is None or several or (takes_text and isinstance(value, str)):
        return
    wanted = "a name, a pattern or a list of names" if takes_text else "a list of names, written [a, b]"
    raise ConfigError(f"{name} of the adapter is {shorten(value)}; it must be {wanted}.")


def check_tying(peft_config, config) -> None:
    """Refuse an adapter that PEFT would carry from a tied embedding over to the head.

    `config`: the model's.
    """
    targets = getattr(peft_config, "target_modules", None) or ()
    if not getattr(peft_config, "ensure_weight_tying", False) or not config.get_text_config().tie_word_embeddings:
        return
    for name in _EMBEDDINGS:
        if isinstance(targets, str):
            named = any(re.fullmatch(targets, path) for path in (name, f"model.{name}", f"transformer.{name}"))
        else:
            named = any(target.rpartition(".")[2] == name for target in targets)
        if named:
            raise ConfigError(
                f"ensure_weight_tying is set with {name} in target_modules: PEFT would adapt the head that is tied to "
                "it as well, whose weight is read directly, so that adapter would never train. Leave "
                f"ensure_weight_tying out, or name {name} in modules_to_save instead."
            )


def check_names(peft_config, model, trust_remote_code: bool = False) -> None:
    """Refuse an adapter's patterns that take long to match with the names of a model's modules.

    `model`: with or without weights, or a model's config, of which one without weights is built.
    """
    found = [] if peft_config is None else patterns.check_adapter(peft_config)
    if not found:
        return
    if not isinstance(model, torch.nn.Module):
        # within the launch, it would spread the weights
        if is_deepspeed_zero3_enabled():
            return
        with torch.random.fork_rng(devices=[]), torch.device("meta"), building("the model"):
            try:
                model = _without_weights(model, trust_remote_code)
            # a model of another kind, or what the trainer's own checks name
            except Exception:
                return
    patterns.check_on(found, [name for name, _ in model.named_modules()], "the adapter's config")


def _without_weights(config, trust_remote_code: bool):
    # the config's own attention may be a kernel of the hub
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="eager", trust_remote_code=trust_remote_code
    )


def check_layers(peft_config, model, trust_remote_code: bool = False) -> None:
    """Refuse an adapter of a scheme of ours that does not fit a model's layers, which the scheme itself says.

    `model`: the model, which its adapter is then put on anyway, or its config, of which one without weights is built.
    """
    if not hasattr(peft_config, "scheme") or isinstance(model, torch.nn.Module) or is_deepspeed_zero3_enabled():
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta"), building("the model"):
        try:
            built = _without_weights(model, trust_remote_code)
        # a model of another kind, or what the trainer's own checks name
        except Exception:
            return
        with upstream_refusals("the adapter cannot be built with these settings"):
            adapter = copy.deepcopy(peft_config)
            adapter.check_placed(get_peft_model(built, adapter))
