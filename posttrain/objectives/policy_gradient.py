"""One estimator for policy gradients and fine-tuning; a method is a choice of its parts.

    gradient = stability mask x 1 / pi_ref x advantage x grad f(pi_theta)
             = stability mask x (pi_theta / pi_ref) x advantage x f'(pi_theta) x grad log pi_theta      per token

The first line's four parts are the fields of `Estimator`: `stability`, `reference` with `level`, `advantage`,
`shaping`. `aggregate` says what the mean is over. Everything but the last factor is detached.
Source: arXiv 2509.04419, the unified policy gradient estimator.
"""

import torch
from torch import Tensor

from posttrain.objectives.estimators import PRESETS, Estimator, parts_table

__all__ = [
    "PRESETS",
    "Estimator",
    "aggregate",
    "equivalent_old_logps",
    "gradient_weight",
    "likelihood_shaping",
    "parts_table",
    "per_token_loss",
    "reference_ratio",
    "stability_mask",
]


def reference_ratio(logps: Tensor, reference_logps: Tensor | None, mask: Tensor, estimator: Estimator) -> Tensor:
    """pi_theta / pi_ref at each token, detached.

    Args:
        logps: (B, T) log-probabilities of the answers' tokens under the policy, in nats.
        reference_logps: (B, T) the same under the reference; read for "old" and "frozen" only. None for "old" says that
            the policy itself sampled the answers, so the ratio is 1, as TRL takes a missing `old_per_token_logps`.
        mask: (B, T) true at tokens that train.

    Returns:
        (B, T) ratios, fp32 or fp64; one value in a row for levels "sequence" and "product". 1 where the mask is off.
    """
    logps, mask = _check(logps, mask)
    logps = logps.detach()
    if estimator.reference == "one":
        log_ratio = logps
    elif estimator.reference == "policy" or (estimator.reference == "old" and reference_logps is None):
        log_ratio = torch.zeros_like(logps)
    elif reference_logps is None:
        raise ValueError(f"reference_logps is None; reference {estimator.reference!r} needs a (B, T) tensor.")
    else:
        log_ratio = logps - _shaped("reference_logps", reference_logps, logps).detach()
    log_ratio = torch.where(mask, log_ratio, 0.0)
    if estimator.level != "token":
        total = log_ratio.sum(-1, keepdim=True)
        if estimator.level == "sequence":
            total = total / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = torch.where(mask, total, 0.0)
    return log_ratio.exp()


def stability_mask(ratio: Tensor, advantages: Tensor, estimator: Estimator) -> Tensor:
    """Return what becomes of each token's gradient for stability: a factor on it, detached.

    clip: 0 where ratio > ratio_max and A > 0, ratio < ratio_min and A < 0, or ratio > delta and A < 0; else 1
    clamp: clamp(ratio, ratio_min, ratio_max) / ratio

    Args:
        ratio: (B, T) from `reference_ratio`.
        advantages: (B,) one a row, or (B, T) one a token.

    Returns:
        (B, T) factors; 1 everywhere for stability "none".
    """
    advantages = _check_advantages(advantages, ratio)
    if estimator.stability == "clamp":
        return _clamp(ratio, estimator) / ratio
    keep = torch.ones_like(ratio, dtype=torch.bool)
    if estimator.stability == "clip":
        keep &= ~((advantages > 0) & (ratio > estimator.ratio_max))
        keep &= ~((advantages < 0) & (ratio < estimator.ratio_min))
        if estimator.delta is not None:
            keep &= ~((advantages < 0) & (ratio > estimator.delta))
    return keep.to(ratio.dtype)


def likelihood_shaping(logps: Tensor, estimator: Estimator) -> Tensor:
    """f'(p) of each token's probability p, detached: 1 for "none", g / (p + g)^2 for "luffy". (B, T) in and out.

    Source: arXiv 2504.14945 (LUFFY), policy shaping; f is read from its code.
    """
    probabilities = _wide(logps).detach().exp()
    if estimator.shaping == "none":
        return torch.ones_like(probabilities)
    return estimator.shaping_gamma / (probabilities + estimator.shaping_gamma) ** 2


def gradient_weight(
    logps: Tensor, reference_logps: Tensor | None, mask: Tensor, advantages: Tensor, estimator: Estimator
) -> Tensor:
    """stability mask x ratio x f'(p) at each token: all of the gradient but the advantage. (B, T), detached.

    Arguments as in `per_token_loss`. 0 where the mask is off.
    """
    logps, mask = _check(logps, mask)
    ratio = reference_ratio(logps, reference_logps, mask, estimator)
    return torch.where(mask, _weight(ratio, logps, advantages, estimator), 0.0)


def per_token_loss(
    logps: Tensor, reference_logps: Tensor | None, mask: Tensor, advantages: Tensor, estimator: Estimator
) -> Tensor:
    """Return the loss of each token, whose gradient is the estimator's, negated.

    d loss / d logps = -(stability mask x ratio x A x f'(p)),   each token's loss on its own log-probability only

    The value is the usual surrogate of the parts: -min(ratio A, clip(ratio) A) for "old" and "frozen" without
    shaping or clamp, -f(p) A for reference "one", and -weight A log p otherwise (SFT, CISPO, A-LoL). For level
    "sequence" it is GSPO's at each token; its gradient reaches a token through that token's own term, which gives
    GSPO's sum over a row where the row has one advantage.

    Args:
        logps: (B, T) log-probabilities of the answers' tokens under the policy, in nats, with gradient.
        reference_logps: (B, T) as in `reference_ratio`, or None.
        mask: (B, T) true at tokens that train; what stands elsewhere is never read.
        advantages: (B,) one a row, or (B, T) one a token; detached here. Where it is 0 the loss is 0.
        estimator: the parts; its `advantage` and `aggregate` are not used here.

    Returns:
        (B, T) losses, fp32 or fp64, 0 where the mask is off. `aggregate` reduces them. A ratio that overflows
        makes the loss infinite and its gradient the largest number of the type.

    Raises:
        ValueError: shapes that do not match; a reference that is needed and missing.
    """
    logps, mask = _check(logps, mask)
    advantages = _check_advantages(advantages, logps)
    # masked first: neither a value nor a gradient of padding may enter, be it infinite
    logps = torch.where(mask, logps, 0.0)
    ratio = reference_ratio(logps, reference_logps, mask, estimator)
    weight = _weight(ratio, logps, advantages, estimator)
    value = _surrogate(logps.detach(), ratio, weight, advantages, estimator)
    alive = mask & (advantages != 0)
    value, slope = (torch.where(alive, part, 0.0) for part in (value, weight * advantages))
    # x - x is 0: the second term brings the gradient and leaves the value as it is. A slope that overflowed is
    # the largest number there, as infinity x 0 is none
    largest = torch.finfo(slope.dtype).max
    slope = slope.clamp(-largest, largest)
    return -(value + slope * (logps - logps.detach()))


def equivalent_old_logps(
    logps: Tensor, reference_logps: Tensor | None, mask: Tensor, advantages: Tensor, estimator: Estimator
) -> Tensor:
    """Return the old log-probabilities with which an unclipped ratio loss has this estimator's gradient.

    old = logps - log(gradient_weight),   so exp(logps - old) is the weight, and so is its derivative

    A loss that knows only -ratio x A at each token (TRL's grpo, bnpo, dapo and dr_grpo at token level, with a clip
    range that never acts) trains any estimator once these stand in for its old log-probabilities. Its value is then
    -weight x A. Rows of several estimators mix: compute each and choose by row.

    Arguments as in `per_token_loss`.

    Returns:
        (B, T) detached; `logps` itself where the mask is off, +inf where the weight is 0 (the ratio is then 0).
    """
    weight = gradient_weight(logps, reference_logps, mask, advantages, estimator)
    logps, mask = _check(logps, mask)
    return torch.where(mask, logps.detach() - weight.log(), logps.detach())


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    estimator: Estimator,
    max_length: int | None = None,
    total_tokens: int | Tensor | None = None,
    total_rows: int | Tensor | None = None,
) -> Tensor:
    """Return these rows' part of the optimiser step's loss: summed over micro-batches and ranks it is the loss.

    token_mean: sum / total_tokens.   row_mean: sum over rows of (sum of the row / its tokens) / total_rows.
    row_sum: sum / total_rows.   dr_grpo: sum / (total_rows x max_length).

    Args:
        per_token: (B, T) from `per_token_loss`.
        mask: (B, T) true at tokens that train. A row without any is a row still.
        max_length: L_max, the longest answer allowed, in tokens; for "dr_grpo".
        total_tokens, total_rows: counts of the whole optimiser step, all micro-batches and ranks; those of these rows
            if None.

    Returns:
        () with gradient.

    Raises:
        ValueError: "dr_grpo" without max_length; shapes that do not match.
    """
    per_token, mask = _check(per_token, mask)
    tokens = mask.sum(-1)
    sums = torch.where(mask, per_token, 0.0).sum(-1)
    rows = per_token.shape[0] if total_rows is None else total_rows
    if estimator.aggregate == "token_mean":
        total = tokens.sum() if total_tokens is None else torch.as_tensor(total_tokens)
        return sums.sum() / total.clamp(min=1)
    if estimator.aggregate == "row_mean":
        return (sums / tokens.clamp(min=1)).sum() / rows
    if estimator.aggregate == "row_sum":
        return sums.sum() / rows
    if max_length is None or not max_length > 0:
        raise ValueError(f"max_length is {max_length}; aggregate 'dr_grpo' divides by it, so it must be above 0.")
    return sums.sum() / (rows * max_length)


def _weight(ratio, logps, advantages, estimator):
    if estimator.stability == "clamp":
        # not mask x ratio: with a ratio that overflowed that is 0 x inf
        stable = _clamp(ratio, estimator)
    else:
        stable = torch.where(stability_mask(ratio, advantages, estimator) > 0, ratio, 0.0)
    return stable * likelihood_shaping(logps, estimator)


def _surrogate(logps, ratio, weight, advantages, estimator):
    if estimator.reference == "one" and estimator.stability == "none" and estimator.level == "token":
        likelihood = ratio if estimator.shaping == "none" else ratio / (ratio + estimator.shaping_gamma)
        return likelihood * advantages
    if estimator.reference in ("old", "frozen") and estimator.stability != "clamp" and estimator.shaping == "none":
        if estimator.stability == "none":
            return ratio * advantages
        bounded = ratio if estimator.delta is None else ratio.clamp(max=estimator.delta)
        return torch.min(bounded * advantages, _clamp(ratio, estimator) * advantages)
    return weight * advantages * logps


def _clamp(ratio, estimator):
    return ratio.clamp(estimator.ratio_min, estimator.ratio_max)


def _wide(values):
    return values if values.dtype == torch.float64 else values.float()


def _check(logps, mask):
    if logps.dim() != 2:
        raise ValueError(f"log-probabilities have shape {tuple(logps.shape)}; (rows, tokens) is needed.")
    return _wide(logps), _shaped("mask", mask, logps).bool()


def _shaped(name, values, like):
    if values.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, the log-probabilities {tuple(like.shape)}.")
    return values


def _check_advantages(advantages, like):
    rows, tokens = like.shape
    if advantages.shape not in ((rows,), (rows, 1), (rows, tokens)):
        raise ValueError(
            f"advantages have shape {tuple(advantages.shape)}; ({rows},), one a row, or ({rows}, {tokens}), one a "
            "token, is needed."
        )
    advantages = advantages.detach().to(like.dtype)
    return (advantages[:, None] if advantages.dim() == 1 else advantages).expand_as(like)
