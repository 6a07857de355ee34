"""Noise on hidden states (NoiseFiT, arXiv 2504.03302): its scale, the layers it suits, and passes with it as rows.

A clean pass and one or two noisy ones are rows of one forward. Below the first noisy layer they are the same, so that
part is computed once; from there on each row comes as often as there are passes.
"""

import math

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.errors import ConfigError
from posttrain.mechanisms.noise import draws
from posttrain.mechanisms.noise.controller import innermost

_TINY = 1e-6
# how fast noise falls with a channel's distance from the median, and how much a token of great variance may get
_DECAY, _MOST = 0.1, 5.0
# the mean of |N(0, 1)|
_MEAN_SIZE = math.sqrt(2 / math.pi)
# keywords of a decoder layer: of a row each, or one for all; bounds of sequences; and what is no tensor of rows
_OF_ROWS = ("attention_mask", "position_ids", "position_embeddings", "cos", "sin", "token_type_ids")
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a causal language model, within its adapter; ConfigError where there are none."""
    inner = innermost(model)
    if getattr(inner.config, "vision_config", None) is None:
        for module in inner.base_model.modules():
            layers = isinstance(module, nn.ModuleList) and len(module) > 0
            if layers and all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
                return module
    raise ConfigError(
        f"{type(inner).__name__} has no list of decoder layers that noise could be added behind. Set `hidden_noise: "
        "none`."
    )


def scales(states: Tensor, found: draws.Sequences, base: float, by_std: bool = False) -> Tensor:
    """Return the scale of the noise of each channel, (N, H) in fp32, for the states (N, H) of N tokens.

    base mad w f, with the lower median over a token's channels, mad that of the distances from it, w = exp(-0.1 |h -
    median| / mad), and f = min(exp(v / mean v), 5) of its variance v, the mean being over the real tokens of its own
    sequence.

    Args:
        found: which sequence each token belongs to.
        base: dimensionless.
        by_std: multiply by the standard deviation of the sequence's states, as version 1 of the published code does.
    """
    h, index = states.detach().float(), found.index
    length = found.lengths.clamp(min=1).float()

    def mean_of(values: Tensor) -> Tensor:
        return (torch.zeros_like(length).index_add_(0, index, values * found.real) / length)[index]

    variance = h.var(dim=-1, unbiased=True)
    excess = torch.exp(variance / (mean_of(variance) + _TINY)).clamp(max=_MOST)
    distance = (h - h.median(dim=-1, keepdim=True).values).abs()
    least = _TINY * h.norm(dim=-1, keepdim=True)
    mad = torch.maximum(distance.median(dim=-1, keepdim=True).values, least)
    made = base * mad * torch.exp(-_DECAY * distance / (mad + _TINY)) * excess[:, None]
    if by_std:
        count = length[index] * h.size(-1)
        mean = mean_of(h.mean(dim=-1))
        spread = mean_of((h - mean[:, None]).square().sum(dim=-1)) * length[index] / (count - 1).clamp(min=1)
        made = made * spread.sqrt()[:, None]
    return made


def with_noise(output, keys: Tensor, found: draws.Sequences, base: float, by_std: bool = False):
    """Return a decoder layer's output with noise in its states (B, T, H), drawn by keys (B * T,); none for padding."""
    states = output[0] if isinstance(output, tuple) else output
    spread = scales(states.flatten(0, 1), found, base, by_std) * found.real[:, None]
    states = states + (draws.normal(keys, states.size(-1)) * spread).view_as(states).to(states.dtype)
    return (states, *output[1:]) if isinstance(output, tuple) else states


def signal_and_noise(states: Tensor, found: draws.Sequences, base: float, by_std: bool = False) -> Tensor:
    """Return the sums over real tokens of mean |h| and of the mean scale of the noise, and their number: (3,), fp64.

    The signal-to-noise ratio of many batches is that of their sums, see `ratio`.
    """
    size = states.detach().float().abs().mean(dim=-1)
    spread = scales(states, found, base, by_std).mean(dim=-1)
    real = found.real
    return torch.stack([size[real].double().sum(), spread[real].double().sum(), real.sum().double()])


def ratio(sums: Tensor) -> float:
    """Return the signal-to-noise ratio in closed form, mean |h| over the mean |noise| to be expected."""
    size, spread, count = sums.tolist()
    count = max(count, 1.0)
    return (size / count) / (_MEAN_SIZE * spread / count + _TINY)
