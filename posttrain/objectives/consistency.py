"""Losses of a clean and of noisy passes over the same tokens: cross-entropy, and how far their predictions part.

NoiseFiT (arXiv 2504.03302): p_c is the distribution of the clean pass, p_1 and p_2 those of noisy ones, all at the
temperature T.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """What a loss is made of, (B,) each, summed over a row's learned tokens, in nats.

    Attributes:
        clean: cross-entropy of the clean pass.
        noisy: cross-entropy of the first noisy pass.
        divergence: T^2 KL(p_c || p_i), the mean over the noisy passes; p_c is detached.
        consistency: T^2 KL(p_2 || p_1); p_2 is detached. 0 with one noisy pass.
    """

    clean: Tensor
    noisy: Tensor
    divergence: Tensor
    consistency: Tensor


class Mode(NamedTuple):
    """Weights of the four terms, and how many noisy passes there are."""

    clean: float
    noisy: float
    divergence: float
    consistency: float
    passes: int


MODES = ("full", "ce_kl", "ce_noisy", "kl_only", "consistency_only")


def mode(name: str, ce_weight: float, consistency_weight: float) -> Mode:
    """Return the weights of a named loss; a = `ce_weight`, lam = `consistency_weight`.

    full              a CE_c + (1 - a) T^2 mean_i KL(p_c || p_i) + lam T^2 KL(p_2 || p_1)
    ce_kl             a CE_c + (1 - a) T^2 KL(p_c || p_1)
    ce_noisy          CE_1
    kl_only           T^2 KL(p_c || p_1)
    consistency_only  T^2 KL(p_2 || p_1)
    """
    return {
        "full": Mode(ce_weight, 0.0, 1.0 - ce_weight, consistency_weight, 2),
        "ce_kl": Mode(ce_weight, 0.0, 1.0 - ce_weight, 0.0, 1),
        "ce_noisy": Mode(0.0, 1.0, 0.0, 0.0, 1),
        "kl_only": Mode(0.0, 0.0, 1.0, 0.0, 1),
        "consistency_only": Mode(0.0, 0.0, 0.0, 1.0, 2),
    }[name]


def loss(terms: Terms, weights: Mode) -> Tensor:
    """Return the weighted sum of the terms, (B,), in nats; a term of weight 0 may be infinite."""
    parts = zip(terms, weights[:4], strict=True)
    return torch.stack([weight * term for term, weight in parts if weight]).sum(dim=0)


def terms_of(clean: Tensor, noisy: Sequence[Tensor], labels: Tensor, temperature: float = 1.0) -> Terms:
    """Return the terms of whole logits: what a head that never holds them must come to.

    Args:
        clean: (B, T, V) logits of the clean pass, with gradient.
        noisy: one or two more of them.
        labels: (B, T) token ids, -100 where nothing is learned; logits at t are for the label at t + 1.
        temperature: T, above 0, of the divergences; cross-entropies are at 1.
    """
    targets = labels[:, 1:]
    mask = targets != -100
    index = targets.clamp(min=0).unsqueeze(-1)
    wide = torch.promote_types(clean.dtype, torch.float32)
    clean, *noisy = (logits[:, :-1].to(wide) for logits in (clean, *noisy))

    def summed(values: Tensor) -> Tensor:
        return values.masked_fill(~mask, 0.0).sum(dim=1)

    def cross_entropy(logits: Tensor) -> Tensor:
        return summed(-logits.log_softmax(dim=-1).gather(-1, index).squeeze(-1))

    def divergence(target: Tensor, logits: Tensor) -> Tensor:
        p, q = (target.detach() / temperature).log_softmax(dim=-1), (logits / temperature).log_softmax(dim=-1)
        return summed((p.exp() * (p - q)).sum(dim=-1)) * temperature**2

    parted = torch.stack([divergence(clean, logits) for logits in noisy]).mean(dim=0)
    consistency = divergence(noisy[1], noisy[0]) if len(noisy) == 2 else torch.zeros_like(parted)
    return Terms(cross_entropy(clean), cross_entropy(noisy[0]), parted, consistency)
