"""Digests of a base model, by which a run, its checkpoints and its adapter know it again."""

import json

import torch
import xxhash
from torch import nn
from torch.distributed.tensor import DTensor

# Of a model's config, what changes its logits and no tensor's shape
_ARCHITECTURE = (
    "model_type", "num_attention_heads", "num_key_value_heads", "hidden_act", "rope_parameters", "rms_norm_eps",
)  # fmt: skip
# Of a quantisation's config, how the rounded weights are stored or placed
_NOT_THE_ROUNDING = {"bnb_4bit_quant_storage", "llm_int8_enable_fp32_cpu_offload", "use_kernels"}
# How many values of each frozen tensor are looked at
_SAMPLE = 4096


def base_digests(
    model,
    split: bool = False,
    adapter_took_from_base: bool = False,
    was_quantised: bool = False,
    whole: bool = False,
) -> dict[str, str]:
    """Digest the shape of a model, and a sample of the weights that it freezes.

    They stay as they are where the model's folder is moved, where weights are loaded in another precision, and over
    resumption. The sample is left out where a process holds a part of the weights alone, or none are frozen.

    Args:
        model: as constructed, before an engine has wrapped it.
        split: whether processes hold parts of the weights.
        adapter_took_from_base: whether making the adapter changed the base under it, which is then left out.
        whole: sample what is not frozen as well, and any adapter: of a model that no step moves.
        was_quantised: leave out the linear layers, as the digest of a base that was loaded quantised does.
    """
    adapters, prefix = getattr(model, "peft_config", None) or {}, getattr(model.base_model, "prefix", None)
    split = split or any(hasattr(value, "ds_shape") or isinstance(value, DTensor) for value in model.parameters())
    text = model.config.get_text_config()
    shape = xxhash.xxh3_128(repr([plain(getattr(text, name, None)) for name in _ARCHITECTURE]).encode())
    sample, taken = xxhash.xxh3_128(), 0
    head = model.get_output_embeddings()
    linear = {
        id(module.weight) for module in model.modules() if type(module) is nn.Linear and was_quantised
    } - {id(getattr(head, "weight", None))}  # fmt: skip
    for name, value in sorted(model.named_parameters()):
        parts = name.split(".")
        of_adapter = adapters.keys() & set(parts) or prefix and any(part.startswith(prefix) for part in parts)
        if of_adapter and not whole:
            continue
        bare = ".".join(part for part in parts if part not in ("base_layer", "original_module", "base_model", "model"))
        shape.update(f"{bare}|{tuple(getattr(value, 'ds_shape', value.shape))}|".encode())
        moved = value.requires_grad and not whole or adapter_took_from_base and "base_layer" in parts
        # a quantised weight depends on the kernel that rounded it
        if split or moved or id(value) in linear or value.is_meta or not value.is_floating_point():
            continue
        some = value.detach().flatten()[:_SAMPLE].to("cpu", torch.bfloat16).contiguous()
        sample.update(f"{bare}|".encode())
        sample.update(some.view(torch.uint8).numpy())
        taken += 1
    return {"base": shape.hexdigest()} | ({"base_weights": sample.hexdigest()} if taken else {})


def quantisation(model) -> dict:
    """Return how a model's weights are quantised, by name: the method, None where they are not, and its settings."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return {"quantisation": None}
    settings = plain(config if isinstance(config, dict) else config.to_dict())
    settings = {
        name: value
        for name, value in settings.items()
        if not name.startswith("_") and name not in _NOT_THE_ROUNDING and isinstance(value, bool | int | float | str)
    }
    return {"quantisation": settings.pop("quant_method", type(config).__name__), **settings}


def plain(value):
    """Convert a value to plain JSON: an enumeration to its value, a set to a sorted list."""
    return json.loads(json.dumps(getattr(value, "value", value), default=_as_json))


def _as_json(value):
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return str(getattr(value, "value", value))
