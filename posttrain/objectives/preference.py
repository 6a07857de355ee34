"""Losses on preference pairs, and the weights that Dr. DPO gives to the pairs of a batch.

Notation, the same in every docstring: `h` is the margin of a pair in nats,
`h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)` with log-probabilities summed over the
completion, and `z = beta * h` is the difference of the implicit rewards. A positive `z` agrees with the label.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo(z: Tensor) -> Tensor:
    """Return the DPO loss of each pair: the negative log-likelihood of its label under Bradley-Terry.

    loss = -log sigmoid(z)

    Args:
        z: (...,) scaled margins `beta * h`.

    Returns:
        (...,) losses in nats, positive; log 2 where z = 0. No reduction.

    Source: arXiv 2305.18290, equation 7.
    """
    return -F.logsigmoid(z)


def cdpo(z: Tensor, flip_rate: float | Tensor) -> Tensor:
    """Conservative DPO: the label is smoothed, so the loss has its minimum at a finite margin.

    loss = -(1 - e) log sigmoid(z) - e log sigmoid(-z) = -log sigmoid(z) + e z

    Args:
        z: (...,) scaled margins.
        flip_rate: e, the probability that a label is flipped, in [0, 0.5); a float or a tensor that broadcasts to z.

    Returns:
        (...,) losses in nats, positive. No reduction.

    Raises:
        ValueError: a flip rate outside [0, 0.5).

    Source: arXiv 2305.18290 with label smoothing (Mitchell 2023, "A note on DPO with noisy preferences").
    """
    flip_rate = check_flip_rate(flip_rate)
    if isinstance(flip_rate, float) and flip_rate == 0.0:
        return dpo(z)
    return dpo(z) + flip_rate * z


def rdpo(z: Tensor, flip_rate: float | Tensor) -> Tensor:
    """Robust DPO: unbiased for the loss on clean labels when each label is flipped with probability e.

    loss = [(1 - e) l(z) - e l(-z)] / (1 - 2 e) = -log sigmoid(z) - k z,   l = dpo,   k = e / (1 - 2 e)

    The loss is unbounded below with slope -k: a negative, falling training loss is normal, and margins do not
    saturate. The gradient weight of a pair is sigmoid(-z) + k.

    Args:
        z: (...,) scaled margins.
        flip_rate: e in [0, 0.5); a float, or a tensor that broadcasts to z (a rate per pair, say per annotator).

    Returns:
        (...,) losses in nats, of either sign; log 2 where z = 0, whatever e. At e = 0 bit-equal to `dpo`.

    Raises:
        ValueError: a flip rate outside [0, 0.5). At 0.5 labels carry no information.

    Source: arXiv 2403.00409, the robust loss (its equation for L_epsilon); the second form is ours, exact and cheap.
    """
    kappa = rdpo_kappa(flip_rate)
    if isinstance(kappa, float) and kappa == 0.0:
        return dpo(z)
    return dpo(z) - kappa * z


def rdpo_kappa(flip_rate: float | Tensor) -> float | Tensor:
    """Return rDPO's constant push on the margin, e / (1 - 2 e), shaped as `flip_rate`; ValueError outside [0, 0.5)."""
    flip_rate = check_flip_rate(flip_rate)
    return flip_rate / (1.0 - 2.0 * flip_rate)


def hinge(z: Tensor) -> Tensor:
    """Return each pair's hinge loss, max(0, 1 - z). (...,) in, (...,) out, no reduction. Source: arXiv 2305.10425."""
    return torch.relu(1 - z)


def ipo(h: Tensor, tau: float) -> Tensor:
    """Identity preference optimisation: regress the margin to 1 / (2 tau).

    loss = (h - 1 / (2 tau))^2

    Args:
        h: (...,) margins of log-probabilities averaged over the tokens of each completion, as TRL takes them.
        tau: regularisation strength, above 0 (TRL's `beta`).

    Returns:
        (...,) losses, non-negative. No reduction.

    Raises:
        ValueError: tau not above 0.

    Source: arXiv 2310.12036, equation 17.
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}; IPO needs tau above 0.")
    return (h - 1 / (2 * tau)) ** 2


def dr_dpo(losses: Tensor, beta_prime: float) -> Tensor:
    """Distributionally robust DPO: the soft minimum of the pair losses of one batch.

    L = -b log( (1/N) sum_n exp(-losses_n / b) ),   b = beta_prime,   over all N entries

    min(losses) <= L <= mean(losses). The gradient of L is sum_n w_n grad(losses_n) with `dr_dpo_weights`, so pairs with
    a high loss are softly ignored. N belongs to the method: at N = 1 it is DPO for every beta_prime.

    Args:
        losses: (N,) pair losses in nats, bounded below (dpo, cdpo, hinge, ipo), of the whole optimiser step.
        beta_prime: b in (0, inf]; smaller ignores more, inf is the plain mean.

    Returns:
        () the objective in nats, fp32 or wider; differentiable in `losses`.

    Raises:
        ValueError: beta_prime zero, negative or NaN; no losses.

    Source: arXiv 2407.07880, equation 10 (the expectation over pairs taken over the batch).
    """
    losses = _check_losses(losses)
    beta_prime = check_beta_prime(beta_prime)
    if math.isinf(beta_prime):
        return losses.mean()
    return -beta_prime * (torch.logsumexp(-losses / beta_prime, dim=0) - math.log(losses.numel()))


def dr_dpo_weights(losses: Tensor, beta_prime: float) -> Tensor:
    """Return the weight of each pair in the gradient of `dr_dpo`.

    w = softmax(-losses / beta_prime)

    Args:
        losses: (N,) pair losses in nats. Detached: the weights are constants of the step.
        beta_prime: in (0, inf]; inf gives 1/N each.

    Returns:
        (N,) weights summing to 1, fp32 or wider.

    Raises:
        ValueError: beta_prime zero, negative or NaN; no losses.

    Source: arXiv 2407.07880, gradient of equation 10.
    """
    losses = _check_losses(losses).detach()
    return torch.softmax(-losses / check_beta_prime(beta_prime), dim=0)


def check_flip_rate(flip_rate: float | Tensor) -> float | Tensor:
    """Return `flip_rate` (numbers as float) if every entry lies in [0, 0.5), else raise ValueError."""
    if isinstance(flip_rate, Tensor):
        valid = (flip_rate >= 0) & (flip_rate < 0.5)
        if not valid.all():
            raise ValueError(_flip_rate_message(flip_rate[~valid].flatten()[0].item()))
        return flip_rate
    flip_rate = float(flip_rate)
    if not 0.0 <= flip_rate < 0.5:
        raise ValueError(_flip_rate_message(flip_rate))
    return flip_rate


def _flip_rate_message(value: float) -> str:
    return (
        f"flip_rate is {value:g}; it must lie in [0, 0.5). 0.5 means that labels carry no information, and above it "
        "most labels are wrong: swap chosen and rejected first."
    )


def check_beta_prime(beta_prime: float) -> float:
    """Return `beta_prime` as a float if it lies in (0, inf], else raise ValueError."""
    beta_prime = float(beta_prime)
    if not beta_prime > 0:
        raise ValueError(f"beta_prime is {beta_prime:g}; it must be above 0 (0.1 to 10 is usual, inf gives plain DPO).")
    return beta_prime


def _check_losses(losses: Tensor) -> Tensor:
    if losses.dim() != 1 or losses.numel() == 0:
        raise ValueError(f"losses has shape {tuple(losses.shape)}; a vector of at least one pair loss is needed.")
    return losses if losses.dtype == torch.float64 else losses.float()
