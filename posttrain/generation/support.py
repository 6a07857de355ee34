"""What generation by guesses can stand for: models, adapters and generation configs whose greedy tokens are its own."""

import inspect

from torch import nn

from posttrain.data.limits import Limits
from posttrain.errors import ConfigError
from posttrain.mechanisms.prefix_sharing.support import scales_with_length

_INSTEAD = "Use `model.generate`."
# of a GenerationConfig, what changes no token of greedy search: ids that are read here, lengths that are given, what
# only sampling, beams or drafts of another model read, caches and outputs
_HARMLESS = frozenset(
    {
        "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id",
        "max_length", "max_new_tokens", "early_stopping", "length_penalty",
        "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
        "renormalize_logits",
        "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size",
        "speculation_type",
        "use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size",
        "continuous_batching_config", "low_memory",
        "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
        "transformers_version",
    }
)  # fmt: skip
# of the others, the values beside None and nothing at all that change no token either
_NEUTRAL = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "is_assistant": (False,),
    "use_mtp": (False,),
    # all but those that round what they hold
    "cache_implementation": (
        *("dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "hybrid", "hybrid_chunked"),
        *("offloaded_hybrid", "offloaded_hybrid_chunked", "sliding_window"),
    ),
}


def check_generation_config(config) -> None:
    """Refuse a `transformers.GenerationConfig` by which greedy search would take other tokens, or stop elsewhere.

    Raises ConfigError with all entries which are neither at a value that changes nothing nor known to change nothing.
    """
    from transformers import GenerationConfig

    if config is None:
        return
    found = {}
    # others are read by nobody
    for name in vars(GenerationConfig()):
        value = getattr(config, name, None)
        if name.startswith("_") or name in _HARMLESS or value is None:
            continue
        if isinstance(value, list | tuple | set | dict | str) and not value:
            continue
        neutral = _NEUTRAL.get(name, ())
        if not (isinstance(value, bool | int | float | str) and value in neutral):
            found[name] = value
    if found:
        told = ", ".join(f"{name} {value!r}" for name, value in found.items())
        mended = "; ".join(f"model.generation_config.{name} = None" for name in found)
        raise ConfigError(
            f"the generation config has {told}, which generation by guesses does not apply. Set `{mended}`, or use "
            "`model.generate`."
        )


def check_adapter(config) -> None:
    """Refuse an adapter whose model takes other tokens where it is given some of a text at a time.

    `config`: a `PeftConfig`, or None. Raises ConfigError for adapters that add virtual tokens, or hang on the prompt.
    """
    if config is None:
        return
    kind, why = getattr(config.peft_type, "value", config.peft_type), None
    if config.is_prompt_learning:
        why = "whose virtual tokens stand in front of each forward's own"
    elif getattr(config, "alora_invocation_tokens", None):
        kind, why = "an activated LoRA", "which begins where its tokens stand in the prompt"
    elif kind == "XLORA":
        why = "which weighs its parts by the whole text at once"
    if why:
        raise ConfigError(f"the adapter is {kind}, {why}; generation by guesses does not do that. {_INSTEAD}")


def check_config(config, kind: type | None = None) -> None:
    """Refuse a model that is no decoder alone, whose cache cannot give tokens back, or whose positions hang on guesses.

    Args:
        config: the model's. kind: its class; by default that of causal language models with such a config.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) if kind is None else kind
    name = getattr(kind, "__name__", config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"the model is a {name}, an encoder-decoder; a causal language model is needed.")
    cache = DynamicCache(config=config)
    cache.activate_past_recording()
    takes = kind is None or "past_key_values" in inspect.signature(kind.forward).parameters
    if not takes or not cache.is_croppable:
        raise ConfigError(f"the cache of {name} cannot give tokens back, which wrong guesses need. {_INSTEAD}")
    if scales_with_length(config):
        raise ConfigError(
            f"{name} turns all positions by how long a forward's text is (rope_type dynamic or longrope): guesses, "
            f"which lie beyond the text, would change the tokens. {_INSTEAD}"
        )


def check_model(model: nn.Module) -> None:
    """Refuse a model of which generation by guesses would not take the tokens of `generate(do_sample=False)`.

    Args:
        model: a causal language model or a PeftModel.

    Raises:
        ConfigError: what `check_config`, `check_adapter` and `check_generation_config` refuse, and a `generate` of the
            model's own.
    """
    from transformers import GenerationMixin

    if not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise ConfigError(f"model is a {type(model).__name__}; a causal language model is needed, or a PeftModel.")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_config(inner.config, type(inner))
    own = getattr(type(inner), "generate", GenerationMixin.generate) is not GenerationMixin.generate
    if own or "generate" in vars(inner):
        raise ConfigError(f"{type(inner).__name__} has a `generate` of its own, which is not greedy search. {_INSTEAD}")
    if hasattr(model, "peft_config"):
        # transformers' own adapters are told by a method
        names = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
        for name in names:
            check_adapter(model.peft_config[name])
    # a PeftModel may have one of its own
    check_generation_config(getattr(model, "generation_config", None))


def learned_positions(model: nn.Module) -> float:
    """Return how many positions a model has in a table; infinite where it computes them."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    limits = Limits(inner, inner.config)
    return limits.positions if limits.has_table else float("inf")


def vocabulary(model: nn.Module) -> float:
    """Return below which number the ids of a model's tokens lie."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return Limits(inner, inner.config).vocabulary
