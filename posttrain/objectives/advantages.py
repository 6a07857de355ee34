"""Advantages of the answers to one prompt, from their rewards; the gate of HPT and its demonstrations' advantage.

Rewards come as `[prompts, G]`, a row per prompt with its G answers: the gathered matrix of all ranks, because the
answers to one prompt may lie on several. NaN marks an answer that no reward function could score. It takes part in no
mean, deviation or quantile, its advantage is 0, and no function here ever returns NaN. Everything is detached, and
computed in fp32 (fp64 for fp64 rewards).
"""

import math

import torch
from torch import Tensor

from posttrain.objectives import advantages

SCALES = ("group", "batch", "none")
INTERPOLATIONS = ("inverted_cdf", "linear")
SFT_NORMALIZATIONS = ("unified", "prompt", "token")

# K * n is off by some 1e-14 where K has no exact binary form: 0.07 * 100 is above 7, and its ceiling would be 8.
_ROUNDING = 1e-9


def group_mean_advantage(rewards: Tensor, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """Compute how far each reward lies above the mean of its group, in units of a standard deviation.

    A = (r - mean(r)) / (s + eps),   or r - mean(r) for scale "none"

    Args:
        rewards: (prompts, G) rewards, NaN where unscorable.
        scale: s is the unbiased standard deviation (ddof 1) of the "group", of the whole "batch" of rewards, or there
            is no division ("none", Dr. GRPO).
        eps: added to s, not under its root; 1e-4 is TRL's value, 1e-6 verl's.

    Returns:
        (prompts, G) advantages, bit-equal to those of TRL 1.16's GRPOTrainer for fp32 rewards. A group of one scorable
        answer gets 0. In a group of equal rewards the mean may be off by a rounding, so that A is not
        exactly 0, as in TRL (0.009 for 16 rewards of 10.1); rewards with exact sums, 0 and 1 say, give 0.

    Raises:
        ValueError: another shape or scale, an infinite reward, eps not above 0.

    Source: arXiv 2402.03300, section 4.1.2 (GRPO); scale "none" arXiv 2503.20783 (Dr. GRPO).
    """
    rewards = _check_rewards(rewards)
    mean = torch.nanmean(rewards, dim=1, keepdim=True)
    return _scaled(rewards - mean, rewards, scale, eps)


def quantile_advantage(
    rewards: Tensor,
    quantile: float | None = 0.4,
    scale: str = "group",
    eps: float = 1e-4,
    interpolation: str = "inverted_cdf",
) -> Tensor:
    """Compute how far each reward lies above the K-quantile of its group; the deviation is the one about the mean.

    A = (r - b) / (s + eps),   b = inf{x : share of the group's rewards <= x is at least K}

    b is the order statistic number ceil(K n) of the n scorable rewards, hence one of them: every answer that ties with
    it gets exactly 0. With rewards of two values and a success rate p, only successes have an advantage where
    p <= 1 - K, and only failures above that. The advantages of a group do not sum to 0.

    Args:
        rewards: (prompts, G) rewards, NaN where unscorable.
        quantile: K, above 0 and below 1; None is `group_mean_advantage`, bit for bit.
        scale, eps: as in `group_mean_advantage`.
        interpolation: "inverted_cdf", or "linear" for torch.quantile's default, which the published code uses; there
            the two sides of the gate mix for some K and G (at G = 8, K = 0.4 with 5 successes b is 0.8).

    Returns:
        (prompts, G) advantages.

    Raises:
        ValueError: as `group_mean_advantage`; a quantile outside (0, 1); another interpolation.

    Source: arXiv 2509.22611. The paper's body was not available: eps and G of its runs are inferred.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation is {interpolation!r}; allowed are {', '.join(INTERPOLATIONS)}.")
    if quantile is None:
        return group_mean_advantage(rewards, scale, eps)
    rewards = _check_rewards(rewards)
    quantile = check_quantile(quantile)
    if interpolation == "linear":
        baseline = torch.nanquantile(rewards, quantile, dim=1, keepdim=True)
    else:
        ranks = [order_statistic(quantile, n) for n in range(rewards.shape[1] + 1)]
        rank = torch.tensor(ranks, device=rewards.device)[_scorable(rewards)]
        # NaN sorts last, so the first n entries are the scorable ones
        baseline = rewards.sort(dim=1).values.gather(1, rank - 1)
    return _scaled(rewards - baseline, rewards, scale, eps)


def leave_one_out_advantage(rewards: Tensor) -> Tensor:
    """Compute how far each reward lies above the mean of the other answers to the same prompt.

    A_i = r_i - mean of r_j over j != i = n / (n - 1) * (r_i - mean(r)),   n scorable answers

    Args:
        rewards: (prompts, G) rewards, NaN where unscorable.

    Returns:
        (prompts, G) advantages, bit-equal to TRL 1.16's RLOOTrainer without its normalisation for fp32 rewards. A group
        of one scorable answer gets 0: it has nobody to be compared with.

    Raises:
        ValueError: another shape, an infinite reward.

    Source: arXiv 2402.14740 (RLOO), equation 7.
    """
    rewards = _check_rewards(rewards)
    others = (_scorable(rewards) - 1).to(rewards.dtype)
    baseline = (rewards.nansum(dim=1, keepdim=True) - rewards) / others
    # one scorable answer: 0 / 0, no answer: NaN / -1
    return torch.nan_to_num(rewards - baseline, nan=0.0)


def success_gate(rewards: Tensor, gamma: float | None, success_threshold: float = 1.0) -> Tensor:
    """Return which prompts the policy fails too often to learn from its own answers.

    True where successes <= floor(gamma n + 1e-9),   n scorable answers, success: reward >= success_threshold

    Integer counts are compared, so gamma = 0.1 of 10 answers is 1 whatever its binary form. An unscorable answer is
    neither a success nor counted in n. A prompt without any scorable answer shows no failure, so it is False, unless
    gamma is 1, which asks for the demonstration of every prompt.

    Args:
        rewards: (prompts, G) rewards, NaN where unscorable.
        gamma: largest success rate at which the demonstration is used, in [0, 1]. None or below 0: never.
        success_threshold: the lowest reward of a success.

    Returns:
        (prompts,) bool; True: learn from the demonstration.

    Raises:
        ValueError: another shape, an infinite reward, gamma above 1 or NaN, a NaN threshold.

    Source: arXiv 2509.04419, the switch gate. The published code tests reward == 1; the threshold is ours.
    """
    rewards = _check_rewards(rewards)
    if math.isnan(success_threshold):
        raise ValueError("success_threshold is nan; it is the lowest reward that counts as a success, 1.0 by default.")
    never = torch.zeros(rewards.shape[0], dtype=torch.bool, device=rewards.device)
    if gamma is None or gamma < 0:
        return never
    if not gamma <= 1:
        raise ValueError(
            f"gamma is {gamma:g}; it is a success rate in [0, 1]. None or a value below 0 never uses demonstrations."
        )
    limits = [math.floor(gamma * n + _ROUNDING) for n in range(rewards.shape[1] + 1)]
    scorable = _scorable(rewards).squeeze(1)
    successes = (rewards >= success_threshold).sum(dim=1)
    gate = successes <= torch.tensor(limits, device=rewards.device)[scorable]
    return gate if gamma == 1 else torch.where(scorable > 0, gate, never)


def demonstration_advantage(
    normalization: str = "unified",
    sft_coef: float = 1.0,
    *,
    group_size: int | None = None,
    max_length: int | None = None,
    demo_tokens: int | Tensor | None = None,
    total_rows: int | Tensor | None = None,
    total_demo_tokens: int | Tensor | None = None,
) -> float | Tensor:
    """Return the advantage of a demonstration that gives HPT's SFT loss its weight where rows are averaged as dr_grpo.

    unified: c                                                 one more row of Dr. GRPO
    prompt:  c x group_size x max_length / demo_tokens         the demonstration's token mean, beside a prompt's RL loss
    token:   c x total_rows x max_length / total_demo_tokens   the mean over all demonstration tokens of the step

    Args:
        normalization: "unified" (the closest to what the published code weighs), "prompt" or "token".
        sft_coef: c, 0 or above.
        group_size: G, rows per prompt.
        max_length: L_max, the longest answer allowed, in tokens.
        demo_tokens: the tokens of this demonstration, or a tensor of them, (D,).
        total_rows, total_demo_tokens: of the whole optimiser step; rows without gradient count.

    Returns:
        The advantage, shaped as `demo_tokens` for "prompt".

    Raises:
        ValueError: another name; sft_coef negative; a count that is needed and missing or below 1.

    Source: arXiv 2509.04419. The normalisations are ours: that of the code depends on how rows are packed.
    """
    if normalization not in SFT_NORMALIZATIONS:
        raise ValueError(f"sft_normalization is {normalization!r}; allowed are {', '.join(SFT_NORMALIZATIONS)}.")
    if not 0 <= sft_coef < math.inf:
        raise ValueError(f"sft_coef is {sft_coef:g}; it must be finite and not negative (1.0 is usual).")
    if normalization == "unified":
        return float(sft_coef)
    if normalization == "prompt":
        counts = {"group_size": group_size, "max_length": max_length, "demo_tokens": demo_tokens}
    else:
        counts = {"total_rows": total_rows, "max_length": max_length, "total_demo_tokens": total_demo_tokens}
    for name, count in counts.items():
        if count is None or not (torch.as_tensor(count) >= 1).all():
            raise ValueError(f"{name} is {count}; sft_normalization {normalization!r} needs it, 1 or more.")
    rows, length, tokens = counts.values()
    return sft_coef * rows * length / tokens


def order_statistic(quantile: float, count: int) -> int:
    """Return which of `count` sorted values, from 1 on, is their K-quantile: ceil(K count), free of float errors."""
    return max(1, math.ceil(quantile * count - _ROUNDING))


def check_quantile(quantile: float) -> float:
    """Return `quantile` as a float if it lies in (0, 1), else raise ValueError."""
    quantile = float(quantile)
    if not 0.0 < quantile < 1.0:
        raise ValueError(
            f"quantile is {quantile:g}; it must lie above 0 and below 1 (0.4 is usual, 0.6 against an early collapse "
            "of the entropy). None takes the mean of the group."
        )
    return quantile


def _scaled(centred: Tensor, rewards: Tensor, scale: str, eps: float) -> Tensor:
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; allowed are {', '.join(SCALES)}.")
    if not eps > 0:
        raise ValueError(f"eps is {eps:g}; it is added to the standard deviation and must be above 0 (1e-4 in TRL).")
    if scale == "group":
        centred = centred / (_std(rewards) + eps)
    elif scale == "batch":
        # flattened first: the order of summation is then TRL's
        centred = centred / (_std(rewards.reshape(1, -1)) + eps)
    return torch.nan_to_num(centred, nan=0.0)


def _std(values: Tensor) -> Tensor:
    """Return the unbiased standard deviation (rows, 1) of each row's entries that are not NaN; 0 below two."""
    count = _scorable(values).to(values.dtype)
    squares = (values - torch.nanmean(values, dim=1, keepdim=True)) ** 2
    variance = torch.nanmean(squares, dim=1, keepdim=True) * (count / (count - 1))
    return torch.where(count > 1, variance, 0.0).sqrt()


def _scorable(rewards: Tensor) -> Tensor:
    return (~rewards.isnan()).sum(dim=1, keepdim=True)


def _check_rewards(rewards: Tensor) -> Tensor:
    if rewards.dim() != 2 or rewards.numel() == 0:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}; (prompts, G) is needed, a row per prompt with its G answers."
        )
    rewards = rewards.detach()
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    infinite = rewards.isinf().any(dim=1)
    if infinite.any():
        row = int(infinite.nonzero()[0])
        raise ValueError(
            f"rewards of prompt {row} are {rewards[row].tolist()}; a reward must be finite, or NaN if unscorable."
        )
    return rewards


def gate_weights(rewards: Tensor, gate: Tensor | None, soft_gate: list | None, threshold: float) -> Tensor:
    """(P, 3) weights of each prompt's rollouts, off-policy demonstration and SFT demonstration.

    Args:
        rewards: (P, G) that success is read from, NaN where unscorable.
        gate: (P,) True where the demonstration takes the rollouts' place; None with a `soft_gate`.
        soft_gate: G + 1 rows of weights by the number of successes.
        threshold: the least reward of a success.
    """
    if soft_gate is not None:
        table = torch.tensor(soft_gate, dtype=torch.float32, device=rewards.device)
        return table[(rewards >= threshold).sum(dim=1)]
    weights = torch.zeros(len(rewards), 3, device=rewards.device)
    weights[:, 0], weights[:, 2] = (~gate).float(), gate.float()
    return weights


def row_advantage(normalization: str, coefficient: float, loss_type: str, length: Tensor, totals: dict) -> Tensor:
    """Return the advantages that give demonstrations of `length` tokens (D,) the weight that `normalization` asks for.

    Args:
        normalization, coefficient: as in `objectives.advantages.demonstration_advantage`, which is of dr_grpo.
        loss_type: TRL's; sets what a token of a row weighs.
        totals: of the generation batch over all ranks: rows, group_size, tokens (of the loss), demonstration_tokens,
            max_length (of a completion).
    """
    rows, max_length = totals["rows"], totals["max_length"]
    wanted = advantages.demonstration_advantage(
        normalization,
        coefficient,
        group_size=totals["group_size"],
        max_length=max_length,
        demo_tokens=length,
        total_rows=rows,
        total_demo_tokens=totals["demonstration_tokens"],
    )
    if normalization == "unified" or loss_type == "dr_grpo":
        return wanted * torch.ones_like(length)
    divisor = {"grpo": rows * length, "sapo": rows * length, "luspo": rows}.get(loss_type, totals["tokens"])
    return wanted * divisor / (rows * max_length) * torch.ones_like(length)
