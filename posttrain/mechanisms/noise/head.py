"""The loss of a clean and of noisy passes from their hidden states, over chunks of learned tokens.

The logits of a chunk are formed once, and with them the gradient of the states: two products with the output embedding
for a pass, and no logits are kept. What it must come to is `posttrain.objectives.consistency`.
"""

import functools
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from posttrain.mechanisms.spread_weights import gathered
from posttrain.objectives.consistency import Mode, Terms

# learned tokens whose logits are held at a time, of each pass; on a CPU more of them fall out of its cache
CHUNK, CHUNK_ON_CPU = 512, 128


class Projection(NamedTuple):
    """What makes logits of hidden states.

    Attributes:
        weight: (V, H), bias: (V,) or None: those of the output embedding, as parameters, which ZeRO-3 gathers.
        scale: what their product is multiplied by.
        softcap: c of c tanh(logits / c), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class Scored(NamedTuple):
    """The loss of a batch's learned tokens.

    Attributes:
        loss: (), the weighted terms, summed over N tokens, in nats; with gradient.
        terms: (N,) each, without gradient; zeros where their weight is 0.
        log_probs, entropy, is_top1: (N,) of the clean pass, without gradient.
    """

    loss: Tensor
    terms: Terms
    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor


def score(
    passes: Sequence[Tensor], projection: Projection, targets: Tensor, weights: Mode, temperature: float = 1.0
) -> Scored:
    """Score the states of N learned tokens.

    Args:
        passes: (N, H) each: those of the clean pass, and of as many noisy ones as the loss has, 0 to 2.
        targets: (N,) token ids.
        weights: see `consistency.mode`.
        temperature: T of the divergences, above 0.
    """
    if len(passes) != 1 + weights.passes:
        raise ValueError(f"there are {len(passes)} passes for a loss of {1 + weights.passes}")
    options = (projection.scale, projection.softcap, weights, temperature)
    loss, *found = _Head.apply(projection.weight, projection.bias, targets, options, *passes)
    return Scored(loss, Terms(*found[:4]), *found[4:])


def output_of(model, passes: Sequence[Tensor], labels: Tensor, weights: Mode, temperature: float = 1.0):
    """Return what the states of a batch score, and the output that TRL's fused head would give of it.

    Args:
        model: the innermost model, whose output embedding is used.
        passes: (B, T, H) last hidden states each, as in `score`.
        labels: (B, T) token ids, -100 where nothing is learned; the state at t is for the label at t + 1.

    Returns:
        (Scored of the N learned tokens, FusedCausalLMOutput with `loss` their sum, and `log_probs` (B, T - 1) that add
        up to minus that sum).
    """
    projection = projection_of(model)
    # a model over several devices may end on another one than its head's
    device = projection.weight.device
    labels = labels[:, 1:].to(device)
    mask = labels != -100
    # found once, as their number is waited for
    places = mask.flatten().nonzero().squeeze(1)
    targets = labels.flatten()[places]
    passes = [one[:, :-1].to(device) for one in passes]
    with maybe_gather_lm_head_ctx(projection.weight, projection.bias):
        scored = score([one.flatten(0, 1)[places] for one in passes], projection, targets, weights, temperature)
    # TRL adds log-probs up; their sum is what counts
    share = scored.loss / max(len(targets), 1)
    fields = {
        name: values.new_zeros(mask.numel()).index_put((places,), values).view(mask.shape)
        for name, values in (("entropy", scored.entropy), ("is_top1", scored.is_top1))
    }
    log_probs = torch.where(mask, -share, torch.zeros_like(share))
    if not len(targets):
        log_probs = log_probs + 0.0 * sum(one.sum() for one in passes)
    return scored, FusedCausalLMOutput(loss=scored.loss, log_probs=log_probs, label_mask=mask, **fields)


def projection_of(model) -> Projection:
    """Return what makes logits of a model's last states, as its configuration tells."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, name, None)) is not None
        ),
        None,
    )
    if scale is None:
        scaling = getattr(config, "logits_scaling", None)
        multiplies = config.model_type == "hyperclovax"
        scale = 1.0 if scaling is None else scaling if multiplies else 1.0 / scaling
    softcap = getattr(config, "final_logit_softcapping", None)
    return Projection(gathered(head.weight), gathered(head.bias), scale, softcap)


def give_scoring(model, is_asked: Callable[[], bool], scored: Callable) -> None:
    """Have the forwards that ask for TRL's fused head and have a gradient scored by another one.

    Args:
        model: the innermost model, with TRL's fused head. Any other call of it is as before.
        is_asked: whether such a forward is to be scored so.
        scored: takes the model and what its forward is given; returns its output, or None where TRL's head is to score.
    """
    before = model.forward
    # unbound where it can be: a deep copy's forward must run the copy
    plain = getattr(before, "__func__", None) or (lambda self, *args, **kwargs: before(*args, **kwargs))

    # generate() checks its arguments against the signature
    @functools.wraps(type(model).forward)
    def forward(self, *args, **kwargs):
        asked = is_asked() and kwargs.get("fused_lm_head") and torch.is_grad_enabled()
        output = scored(self, *args, **kwargs) if asked else None
        return plain(self, *args, **kwargs) if output is None else output

    model.forward = types.MethodType(forward, model)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, targets, options, *states):
        needs_weight, needs_bias = ctx.needs_input_grad[0], bias is not None and ctx.needs_input_grad[1]
        # of the clean pass there is no gradient where nothing but divergences counts
        needed = ctx.needs_input_grad[4:]
        grads = [torch.zeros_like(one) if need else None for one, need in zip(states, needed, strict=True)]
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight)) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_wide(bias)) if needs_bias else None
        parts = []
        size = CHUNK_ON_CPU if targets.device.type == "cpu" else CHUNK
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            own = [one[chunk] for one in states]
            logits = [_logits(one, weight, bias, options) for one in own]
            found, grads_of_logits = _of_chunk(logits, targets[chunk], options)
            parts.append(found)
            for place, (of_logits, one) in enumerate(zip(grads_of_logits, own, strict=True)):
                if of_logits is None:
                    continue
                before = _before_cap(of_logits, logits[place], options).to(one.dtype)
                if grads[place] is not None:
                    grads[place][chunk] = before @ weight.to(one.dtype)
                if needs_weight:
                    grad_weight += before.T @ one
                if needs_bias:
                    grad_bias += before.sum(dim=0)
        if not parts:
            empty = states[0].new_zeros(0, dtype=_wide(states[0]))
            parts = [(empty,) * 6 + (empty.bool(),)]
        *terms, log_probs, entropy, is_top1 = (torch.cat(values) for values in zip(*parts, strict=True))
        weights = options[2]
        loss = sum((w * term.sum() for w, term in zip(weights[:4], terms, strict=True)), log_probs.new_zeros(()))
        ctx.save_for_backward(grad_weight, grad_bias, *grads)
        ctx.types = weight.dtype, None if bias is None else bias.dtype
        outputs = (*terms, log_probs, entropy, is_top1)
        ctx.mark_non_differentiable(*outputs)
        return (loss, *outputs)

    @staticmethod
    def backward(ctx, grad, *_):
        grad_weight, grad_bias, *grads = ctx.saved_tensors
        of_weight, of_bias = (
            None if value is None else (value * grad).to(kind)
            for value, kind in zip((grad_weight, grad_bias), ctx.types, strict=True)
        )
        of_states = (None if value is None else value * grad.to(value.dtype) for value in grads)
        return of_weight, of_bias, None, None, *of_states


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, options) -> Tensor:
    scale, softcap, *_ = options
    logits = torch.nn.functional.linear(
        states, weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
    )
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _before_cap(grad: Tensor, logits: Tensor, options) -> Tensor:
    """Return the gradient of the plain product from that of the logits."""
    scale, softcap, *_ = options
    return grad * scale if softcap is None else grad * (1.0 - (logits / softcap).square()) * scale


def _of_chunk(logits: list[Tensor], targets: Tensor, options) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Return the terms, log-probs, entropy and hits (n,) of a chunk, and the gradient of each pass's logits (n, V)."""
    *_, weights, t = options
    clean, *noised = logits
    index = targets[:, None]
    zero = clean.new_zeros(len(targets))
    logps = clean.log_softmax(dim=-1)
    found = logps.gather(-1, index)[:, 0]
    grads: list[Tensor | None] = [None] * len(logits)

    def add(place: int, grad: Tensor) -> None:
        grads[place] = grad if grads[place] is None else grads[place] + grad

    def cross_entropy(place: int, logps: Tensor, weight: float) -> None:
        add(place, weight * (logps.exp() - torch.zeros_like(logps).scatter_(-1, index, 1.0)))

    def divergence(target: Tensor, place: int, weight: float) -> Tensor:
        own = warm[place]
        add(place, weight * t * (own.exp() - target.exp()))
        return (target.exp() * (target - own)).sum(dim=-1) * t**2

    if weights.clean:
        cross_entropy(0, logps, weights.clean)
    noisy = zero
    if weights.noisy:
        first_logps = noised[0].log_softmax(dim=-1)
        noisy = -first_logps.gather(-1, index)[:, 0]
        cross_entropy(1, first_logps, weights.noisy)
    parted, consistent = zero, zero
    if weights.divergence or weights.consistency:
        warm = [(one / t).log_softmax(dim=-1) for one in logits]
        if weights.divergence:
            share = weights.divergence / weights.passes
            parted = sum(divergence(warm[0], place, share) for place in range(1, len(logits))) / weights.passes
        if weights.consistency:
            consistent = divergence(warm[2], 1, weights.consistency)
    entropy = -(logps.exp() * logps).sum(dim=-1)
    return (-found, noisy, parted, consistent, found, entropy, clean.argmax(dim=-1) == targets), grads
