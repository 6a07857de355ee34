"""Where prefix sharing can work, and what a longer row costs."""

import dataclasses
import inspect
import math

import torch

from posttrain.mechanisms.prefix_sharing.packing import ATTENTION_COST, pack_padded

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
_LAYERS = {"full_attention", "sliding_attention"}


def unsupported_reason(config, model=None, attention: str | None = None, peft_config=None) -> str | None:
    """Return why prefix sharing cannot work for a model, or None.

    Args:
        config: the model's config; enough to know before the weights are loaded.
        model: the causal language model itself, where it is there.
        attention: the attention implementation asked for; default: the config's.
        peft_config: the adapter's config, if there is one.
    """
    text = config.get_text_config()
    attention = attention or text._attn_implementation
    if text is not config:
        return "a multimodal model places its own positions"
    if config.is_encoder_decoder:
        return "an encoder-decoder reads the prompt apart from the answer"
    if attention is not None and attention not in IMPLEMENTATIONS:
        return f"attention implementation {attention} takes no mask; use sdpa, eager or flex_attention"
    if getattr(peft_config, "is_prompt_learning", False):
        return f"{getattr(peft_config.peft_type, 'value', peft_config.peft_type)} puts virtual tokens in front"
    if getattr(peft_config, "alora_invocation_tokens", None):
        return "activated LoRA looks for its tokens in the padded rows"
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYERS)
    if others:
        return f"layers of type {', '.join(others)} do not go by a mask"
    if "local" in (getattr(text, "attention_layers", None) or ()):
        return "local attention goes by the place in the row, not by position ids"
    if getattr(text, "alibi", False):
        return "ALiBi goes by the place in the row, not by position ids"
    if getattr(text, "output_router_logits", False):
        return "the auxiliary loss of a mixture of experts counts prompt tokens"
    if model is not None:
        if getattr(model, "_is_stateful", False):
            return "a state-space model carries its state from one answer into the next"
        if "position_ids" not in inspect.signature(type(model.base_model).forward).parameters:
            return f"{type(model).__name__} builds its positions itself"
        if hasattr(getattr(model.base_model, "embeddings", None), "padding_idx"):
            return f"{type(model).__name__} counts positions from its padding id"
    return None


def sliding_window(config) -> int | None:
    """Return the least number of tokens that a layer looks back; None where all look back to the start."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        return None
    return getattr(text, "sliding_window", None)


def scales_with_length(config) -> bool:
    """Return whether rotary factors depend on the longest row of a forward, so that what is in it matters."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    kinds = [str(entry.get("rope_type")) for entry in nested]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def attention_cost(config, factor: float = 1.0) -> float:
    """Return the cost of one attended position to a token, as a share of the cost of its linear layers.

    The share of multiplications, times `factor`: how much longer an attention kernel takes over one than they do.
    """
    text = config.get_text_config()
    try:
        hidden, heads = text.hidden_size, text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        inner = getattr(text, "intermediate_size", None) or 4 * hidden
        return factor * 2 * heads * head_dim / (2 * hidden * head_dim * (heads + key_heads) + 3 * hidden * inner)
    except (AttributeError, TypeError):
        # layers of different sizes
        return factor * ATTENTION_COST


def factor_of(attention: str | None, device_type: str) -> float:
    """Return the factor of `attention_cost` for an attention implementation on a type of device.

    On CUDA devices sdpa with a mask takes an estimated 1.8 (cuDNN) to 4.5 times (its memory-efficient kernel) as long
    over a multiplication as linear layers do.
    """
    return 3.0 if device_type == "cuda" and attention in (None, "sdpa") else 1.0


# Nats that padded and packed log-probs of the self-check may differ by: largest in fp32, mean in half precision, where
# rounding alone makes hundredths. There a mean above the second number is also held against what a model would be off
# by if it ignored the mask or the positions.
_LARGEST_FP32, _MEAN_HALF, _NOISE_HALF = 2e-3, 0.25, 0.02


def mismatch_reason(largest: float, mean: float, if_ignored: float, half: bool) -> str | None:
    """Return an error text if packed and padded log-probs disagree by more than rounding; None if they agree.

    Args:
        largest, mean, if_ignored: what `self_check` returns.
        half: whether the model computes in half precision.
    """
    good = largest <= _LARGEST_FP32
    if half:
        good = mean <= _NOISE_HALF or mean <= min(_MEAN_HALF, if_ignored / 2)
    return None if good else f"packed log-probs differ from padded ones by up to {largest:.3g} nats on made-up tokens"


def compare_padded_and_packed(model, config, device, left: bool = False) -> tuple[float, float, float, str | None]:
    """Run `self_check`; if the model's own code fails on packed rows, return infinite differences and the error."""
    try:
        return *self_check(model, config.get_text_config().vocab_size, device, left), None
    except Exception as error:
        # whatever it is, in code that is not ours: the model is padded then
        return math.inf, math.inf, 0.0, f"the model cannot run packed rows ({type(error).__name__}: {error})"


def self_check(model, vocab_size: int, device, left: bool = False) -> tuple[float, float, float]:
    """Measure the (largest, mean) difference in nats between padded and packed log-probs of a few made-up tokens.

    The third number is the mean difference that a model would have if it ignored the mask, or, if that is less, the
    positions.

    Two prompts with two answers each in one packed row. `model` is called without gradient and should be in eval mode;
    it is a model with `share_prefixes`, or one around it. `left`: the batch also has padding on the left, as
    rollouts have.
    """
    generator = torch.Generator().manual_seed(0)
    groups, before = (0, 0, 1, 1), 3 if left else 0
    starts = torch.tensor([before, before, 0, 0]).unsqueeze(1)
    answers = starts + torch.tensor([6, 6, 4, 4]).unsqueeze(1)
    ends = starts + torch.tensor([10, 8, 7, 9]).unsqueeze(1)
    input_ids = torch.randint(vocab_size, (4, 10 + before), generator=generator)
    for row in (1, 3):
        prompt = slice(starts[row], answers[row])
        input_ids[row, prompt] = input_ids[row - 1, prompt]
    places = torch.arange(10 + before)
    attention_mask = ((places >= starts) & (places < ends)).long()
    scored = attention_mask.bool() & (places >= answers)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    batch |= {"labels": input_ids.masked_fill(~scored, -100)}
    batch = {key: value.to(device) for key, value in batch.items()}
    packed = pack_padded(*batch.values(), groups, attention_cost=0.0)
    row = torch.zeros_like(packed.blocks)
    maskless = dataclasses.replace(packed, blocks=row, branches=row, _masks={})
    running = torch.arange(row.size(1), device=row.device).expand_as(row)
    placeless = dataclasses.replace(packed, position_ids=running, _masks={})
    scored = scored[:, 1:].to(device)
    with torch.no_grad():
        padded = model(**batch, use_cache=False, fused_lm_head=True).log_probs
        gap, *if_ignored = (
            (padded - model(**batch, use_cache=False, fused_lm_head=True, packed=form).log_probs).float().abs()[scored]
            for form in (packed, maskless, placeless)
        )
    return gap.max().item(), gap.mean().item(), min(one.mean().item() for one in if_ignored)
