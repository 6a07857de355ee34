"""The A-LoL family: losses on logged answers, each weighed by its reward or by how much it beats the expected one.

Notation: an answer y to a prompt x is one action. R is its reward, V(x) the reward that the starting model is expected
to earn, A = R - V the advantage and A+ = max(A, 0). w = pi_theta(y|x) / pi_ref(y|x) is the importance ratio of the
whole answer, w_t that of a token; both are detached, as every weight is.
"""

import math
import numbers

import torch
from torch import Tensor

# What weighs an answer: its reward, its advantage or nothing
_BY_REWARDS = ("wbc", "r_gold", "r_lol")
_BY_ADVANTAGES = ("a_lol", "a_lol_seq", "a_lol_ref_free", "a_lol_kl")
VARIANTS = ("nll", *_BY_REWARDS, *_BY_ADVANTAGES)
NEEDS_REFERENCE = ("r_lol", "a_lol", "a_lol_seq")
# The least probability that R-GOLD weighs a token by
GOLD_FLOOR = 0.1


def a_lol(
    per_token_logps: Tensor,
    ref_per_token_logps: Tensor | None,
    mask: Tensor,
    advantages: Tensor | None = None,
    variant: str = "a_lol",
    clip: float | None = 0.9,
    kl_beta: float = 0.0,
    rewards: Tensor | None = None,
    keep_negative: bool = False,
) -> Tensor:
    """Return the loss of each answer: its negative log-likelihood, summed over its tokens, times the variant's weight.

    nll             NLL,  NLL = -sum_t log pi_theta(y_t)
    wbc             R NLL                                            weighted behaviour cloning
    r_gold          R sum_t max(p_t, 0.1) (-log p_t)                 p_t detached
    r_lol           R clip(w) NLL
    a_lol           A+ clip(w) NLL,  w = exp(sum_t(logp - logp_ref))
    a_lol_seq       A+ sum_t clip(w_t) (-log p_t)                    per token, despite its name
    a_lol_ref_free  A+ NLL
    a_lol_kl        A+ NLL + beta sum_t(logp - logp_ref)

    clip(w) = clamp(w, 1 - clip, 1 + clip), a plain clamp without PPO's minimum, so the gradient never vanishes from
    clipping. The gradient of a_lol_kl is -(A+ - beta) grad log pi: beta moves the threshold, and an answer with
    0 <= A < beta is pushed down. Its reference is a constant.

    Args:
        per_token_logps: (B, T) log-probabilities of the answers' tokens, their end included, in nats; with gradient.
        ref_per_token_logps: (B, T) the same under the frozen starting model. Needed by r_lol, a_lol and a_lol_seq. For
            a_lol_kl it only moves the value: without it the loss is larger by beta sum_t(logp_ref), the gradient
            the same. Ignored elsewhere; may be None where it is not needed.
        mask: (B, T) true at the answers' tokens; what stands elsewhere is never read.
        advantages: (B,) A, for the variants named a_lol; negative ones count 0.
        variant: a name of the table.
        clip: above 0; None or inf for the exact ratio. Read by r_lol, a_lol and a_lol_seq.
        kl_beta: 0 or more; for a_lol_kl only.
        rewards: (B,) R, for wbc, r_gold and r_lol. nll reads neither weight.
        keep_negative: A instead of A+, as the published code has it for a_lol_ref_free: answers below the expected
            reward are pushed down without bound.

    Returns:
        (B,) losses in nats times the reward's unit, fp32 or fp64. No reduction: the mean is over sequences. Where the
        weight is 0, loss and gradient are 0 however large the exact ratio is (but for a_lol_kl's KL part).

    Raises:
        ValueError: an unknown variant; a weight or a reference that is needed and missing; both weights; clip not above
            0; kl_beta negative, or above 0 with another variant; what is no tensor or no number where one is needed;
            shapes that do not match.

    Source: arXiv 2305.14718; the variants as its published code has them.
    """
    check_settings(variant, clip, kl_beta)
    _check_tensor("per_token_logps", per_token_logps, "(answers, tokens)")
    if per_token_logps.dim() != 2:
        raise ValueError(f"per_token_logps has shape {tuple(per_token_logps.shape)}; (answers, tokens) is needed.")
    if advantages is not None and rewards is not None:
        raise ValueError(
            f"advantages and rewards are both given; variant {variant!r} weighs by {weight_of(variant) or 'neither'}. "
            "Leave the other out."
        )
    logps = per_token_logps if per_token_logps.dtype == torch.float64 else per_token_logps.float()
    mask = _shaped("mask", mask, logps).bool()
    # masked first: neither a value nor a gradient of padding may enter, be it infinite
    logps = torch.where(mask, logps, 0.0)
    weight = _weight(variant, advantages, rewards, logps, keep_negative)
    if weight is not None and not kl_beta:
        # the exact ratio of an answer that counts nothing may be infinite, and 0 * inf is no number
        mask = mask & (weight != 0).unsqueeze(1)
        logps = torch.where(mask, logps, 0.0)
    nll = -logps.sum(dim=1)
    if variant == "nll":
        return nll
    if variant == "r_gold":
        return weight * (logps.detach().exp().clamp(min=GOLD_FLOOR) * -logps).sum(dim=1)
    if variant in NEEDS_REFERENCE:
        log_ratio = _log_ratio(variant, logps, ref_per_token_logps, mask)
        if variant == "a_lol_seq":
            return weight * (clamp_ratio(log_ratio.exp(), clip) * -logps).sum(dim=1)
        return weight * clamp_ratio(log_ratio.sum(dim=1).exp(), clip) * nll
    if variant == "a_lol_kl" and kl_beta:
        drift = -nll
        if ref_per_token_logps is not None:
            reference = _shaped("ref_per_token_logps", ref_per_token_logps, logps).detach().to(logps.dtype)
            drift = drift - torch.where(mask, reference, 0.0).sum(dim=1)
        return weight * nll + kl_beta * drift
    return weight * nll


def gradient_weights(variant: str, weights: Tensor, kl_beta: float = 0.0, keep_negative: bool = False) -> Tensor:
    """Return the factor of each answer on the gradient of its NLL, importance ratio and R-GOLD's likelihoods apart.

    Args:
        weights: (N,) rewards or advantages, whichever the variant reads; of nll any values.

    Returns:
        (N,): 1 for nll, R, A+ (A with `keep_negative`), and A+ - beta for a_lol_kl. Where it is 0 the answer has
        exactly no gradient.
    """
    if variant == "nll":
        return torch.ones_like(weights)
    if variant in _BY_REWARDS:
        return weights
    weights = weights if keep_negative else weights.clamp(min=0)
    return weights - kl_beta if variant == "a_lol_kl" else weights


def clamp_ratio(ratio: Tensor, clip: float | None) -> Tensor:
    """clamp(ratio, 1 - clip, 1 + clip); as it is for None or inf."""
    return ratio if clip is None or math.isinf(clip) else ratio.clamp(1 - clip, 1 + clip)


def weight_of(variant: str) -> str | None:
    """Return what weighs an answer: "rewards", "advantages" or None."""
    return "rewards" if variant in _BY_REWARDS else "advantages" if variant in _BY_ADVANTAGES else None


def check_settings(variant: str, clip: float | None, kl_beta: float) -> None:
    """Raise ValueError for an unknown variant, a clip or a kl_beta out of range, or one that has no effect."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(VARIANTS)}.")
    if variant in NEEDS_REFERENCE and clip is not None and not (_is_number(clip) and clip > 0):
        raise ValueError(
            f"clip is {clip!r}; it must be above 0 (0.9 keeps ratios in [0.1, 1.9]), or null for the exact ratio. For "
            "a fixed ratio of 1 use variant a_lol_ref_free."
        )
    if not (_is_number(kl_beta) and 0 <= kl_beta < math.inf):
        raise ValueError(f"kl_beta is {kl_beta!r}; it must be a number of 0 or more.")
    if kl_beta and variant != "a_lol_kl":
        raise ValueError(
            f"kl_beta is {kl_beta:g} with variant {variant}, which has no KL part: a_lol_kl has one, and no importance "
            "ratio. Set `variant: a_lol_kl`, or `kl_beta: 0`."
        )


def _weight(variant, advantages, rewards, logps, keep_negative) -> Tensor | None:
    name = weight_of(variant)
    if name is None:
        return None
    weight = rewards if name == "rewards" else advantages
    if weight is None:
        raise ValueError(f"{name} is None; variant {variant!r} weighs by {name}, a tensor of ({len(logps)},).")
    _check_tensor(name, weight, f"({len(logps)},)")
    if weight.shape != logps.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; one number an answer, ({len(logps)},), is needed.")
    weight = weight.detach().to(logps.dtype)
    return weight if name == "rewards" or keep_negative else weight.clamp(min=0)


def _log_ratio(variant, logps, ref_per_token_logps, mask) -> Tensor:
    if ref_per_token_logps is None:
        raise ValueError(f"ref_per_token_logps is None; variant {variant!r} needs a tensor of {tuple(logps.shape)}.")
    reference = _shaped("ref_per_token_logps", ref_per_token_logps, logps).detach().to(logps.dtype)
    return torch.where(mask, logps.detach() - reference, 0.0)


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_tensor(name, value, shape) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is of type {type(value).__name__}; a tensor of shape {shape} is needed.")


def _shaped(name, values, like):
    _check_tensor(name, values, tuple(like.shape))
    if values.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, per_token_logps {tuple(like.shape)}.")
    return values
