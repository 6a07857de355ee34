"""Which layers take hidden noise, and how much each: by what noise behind each alone does to the predictions."""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch

from posttrain.mechanisms.noise import draws, hidden
from posttrain.mechanisms.noise.controller import innermost

# strengths that are tried behind each layer, in units of 1 / sqrt(H)
FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0)
# of the clean cross-entropy: a greater rise rules a strength out
_MOST_RISE = 0.02
_BANDS = 3


class Choice(NamedTuple):
    """Noisy layers, in order, and the factor of each; `scores` tells the best score of every layer."""

    layers: list[int]
    factors: list[float]
    scores: list[float]


def choose(
    divergences: Sequence[Sequence[float]],
    rises: Sequence[Sequence[float]],
    clean: float,
    factors: Sequence[float] = FACTORS,
) -> Choice:
    """Choose layers and strengths of NoiseFiT's noise (arXiv 2504.03302, version 2 of its code).

    The score of a strength is KL / (1 + r) / (1 + log2(factor)^2 / 20), where r is the rise of cross-entropy over the
    clean one; strengths with r above 0.02 do not count, where there are others. Of the layers whose best score is at
    least the median and its median absolute deviation, up to ceil(sqrt(layers)) are taken, the best first, no third of
    the depth having more than its share while another has some left. Each gets the smallest strength whose divergence
    reaches 0.75 of the median of the best ones of the layers taken, or else the one that is nearest to it.

    Args:
        divergences: symmetric KL of clean and noisy predictions in nats a token, by layer and factor.
        rises: how much cross-entropy rises, in nats a token, likewise.
        clean: cross-entropy of the clean predictions, above 0.
    """
    count = len(divergences)
    rates = [[max(rise, 0.0) / clean for rise in row] for row in rises]
    valid = [[rate <= _MOST_RISE for rate in row] for row in rates]
    if not any(map(any, valid)):
        valid = [[True] * len(factors) for _ in valid]

    def score(layer: int, place: int) -> float:
        penalty = (1 + rates[layer][place]) * (1 + math.log2(factors[place]) ** 2 / 20)
        return divergences[layer][place] / penalty

    places = [[place for place in range(len(factors)) if valid[layer][place]] for layer in range(count)]
    best = [
        max(own, key=lambda place, layer=layer: score(layer, place), default=None) for layer, own in enumerate(places)
    ]
    scores = [0.0 if place is None else score(layer, place) for layer, place in enumerate(best)]
    middle = statistics.median(scores)
    least = middle + statistics.median(abs(one - middle) for one in scores)
    most = math.ceil(math.sqrt(count))
    wanted = sorted(
        (layer for layer in range(count) if scores[layer] >= least and best[layer] is not None),
        key=lambda layer: (-scores[layer], layer),
    )
    share, taken = math.ceil(most / _BANDS), []
    for quota in (share, most):
        for layer in wanted:
            band = [other for other in taken if other * _BANDS // count == layer * _BANDS // count]
            if layer not in taken and len(taken) < most and len(band) < quota:
                taken.append(layer)
    taken.sort()
    aim = 0.75 * statistics.median(divergences[layer][best[layer]] for layer in taken)

    def strength(layer: int) -> float:
        enough = [place for place in places[layer] if divergences[layer][place] >= aim]
        if enough:
            return min(factors[place] for place in enough)
        near = min(places[layer], key=lambda place: abs(_log(divergences[layer][place]) - _log(aim)))
        return factors[near]

    return Choice(taken, [strength(layer) for layer in taken], scores)


@torch.no_grad()
def measure(model, batches, seed: int) -> tuple[list[list[float]], list[list[float]], float]:
    """Forward batches without noise, and with each strength of it behind each layer alone.

    Args:
        model: a causal language model in eval mode, within its adapter.
        batches: each with input_ids, labels and what else the model is given.

    Returns:
        Symmetric KL in nats a learned token by layer and factor, the rise of cross-entropy likewise, and that without
        noise: the first two arguments of `choose`, and the third.
    """
    layers = hidden.decoder_layers(model)
    size = innermost(model).config.get_text_config().hidden_size
    parted = torch.zeros(len(layers), len(FACTORS), dtype=torch.float64)
    raised, clean, count = torch.zeros_like(parted), 0.0, 0
    for batch in batches:
        given = {name: value for name, value in batch.items() if name != "labels"}
        ids, targets = given["input_ids"], batch["labels"][:, 1:]
        mask = targets != -100
        targets = targets[mask]
        found = draws.sequences(ids, given.get("attention_mask"), given.get("position_ids"))

        def predicted(given=given, mask=mask):
            # the whole model is called, as FSDP gathers weights in its forward
            return model(**given, use_cache=False).logits[:, :-1][mask].float().log_softmax(dim=-1)

        def missed(logps, targets=targets):
            return -logps.gather(-1, targets[:, None]).double().sum().item()

        own = predicted()
        clean, count = clean + missed(own), count + len(targets)
        for number, layer in enumerate(layers):
            keys = draws.token_keys(ids, found, seed, 0, 1 + 2 * number)
            for place, factor in enumerate(FACTORS):
                hook = layer.register_forward_hook(functools.partial(_add, found, keys, factor / math.sqrt(size)))
                try:
                    noisy = predicted()
                finally:
                    hook.remove()
                both = ((own.exp() - noisy.exp()) * (own - noisy)).double().sum().item() / 2
                parted[number, place] += both
                raised[number, place] += missed(noisy) - missed(own)
    count = max(count, 1)
    return (parted / count).tolist(), (raised / count).tolist(), clean / count


def _add(found, keys, base: float, module, args, output):
    return hidden.with_noise(output, keys, found, base)


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))
