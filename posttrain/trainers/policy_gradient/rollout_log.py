"""What is measured of rollouts: success, pass@k, the quantile's two sides, greedy answers, and means over an update."""

import contextlib
import copy
import math
from collections import defaultdict

import torch
from datasets import Dataset
from torch import Tensor

from posttrain.mechanisms import group_rewards
from posttrain.objectives import advantages
from posttrain.trainers.policy_gradient import completion_log

# What TRL logs of an update: means over tokens; over tokens, or rows where a ratio is a row's; over rows
_OF_TOKENS = ("entropy", "kl")
_OF_RATIOS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")
_OF_ROWS = ("vespo/phi_seq_mean",)
_EXTREMES = {"clip_ratio/low_min": min, "clip_ratio/high_max": max}


def success_rewards(trainer, rewards: Tensor) -> Tensor:
    """Return the rewards (N,) that decide success: the sum, or the function named by success_reward."""
    if trainer.args.success_reward is None:
        return rewards
    return trainer._rewards[:, trainer.reward_func_names.index(trainer.args.success_reward)]


def record(trainer, rewards: Tensor, size: int, mode: str) -> None:
    """Log how many of a batch's rollouts (N,) and prompts succeed."""
    metrics = trainer._metrics[mode]
    success = (success_rewards(trainer, rewards) >= trainer.args.least_success).view(-1, size)
    metrics["rollouts/unscorable_share"].append(torch.isnan(rewards).float().mean().item())
    metrics["rollouts/pass_at_1"].append(success.float().mean().item())
    if size > 1:
        metrics[f"rollouts/pass_at_{size}"].append(success.any(dim=1).float().mean().item())


def record_quantile(trainer, rewards: Tensor, values: Tensor, mode: str) -> None:
    """Log on which side of the quantile prompts lie, by `rewards` (P, G) and advantages `values` (N,)."""
    args, metrics = trainer.args, trainer._metrics[mode]
    above = advantages.quantile_advantage(
        rewards, args.quantile, scale="none", interpolation=args.quantile_interpolation
    )
    # the same in each scorable column
    baseline = torch.nanmean(rewards - above, dim=1)
    hard = baseline[~torch.isnan(baseline)] < args.least_success
    metrics["qae/frac_zero_advantage"].append((values == 0).float().mean().item())
    metrics["qae/frac_hard_prompts"].append(hard.float().mean().item())
    metrics["qae/frac_easy_prompts"].append((~hard).float().mean().item())
    metrics["qae/baseline_mean"].append(torch.nanmean(baseline).item())


def take_means(trainer, scored: dict) -> None:
    """Turn TRL's latest metrics of a training micro-batch into sums and counts over its tokens or rows.

    TRL takes a mean over a micro-batch on all ranks and averages those: a micro-batch without tokens counts as 0
    there, and one of few tokens as much as one of many.

    Args:
        scored: this rank's micro-batch, as the loss has read it. Rows without tokens are in no mean.
    """
    metrics = trainer._metrics["train"]
    tokens = group_rewards.loss_tokens(scored).float()
    kept = (tokens > 0).float().sum()
    ratios_of_rows = trainer.importance_sampling_level == "sequence" and scored["advantages"].dim() == 1
    for name in _OF_TOKENS + _OF_RATIOS + _OF_ROWS:
        if not metrics.get(name):
            continue
        value = metrics.pop(name)[-1]
        of_rows = name in _OF_ROWS or (ratios_of_rows and name in _OF_RATIOS)
        # undo TRL's division; it takes values of width 1 for a row's
        by_rows = of_rows or scored["completion_ids"].size(1) == 1
        total = value * (torch.ones_like(tokens).sum() if by_rows else tokens.sum())
        if name in _OF_ROWS:
            # a row without tokens has the weight of ratio 1, which is 1; it has no entropy and is never clipped
            total = total - (tokens == 0).float().sum()
        trainer._means["train"].add_sum(name, total, kept if of_rows else tokens.sum())
    if ratios_of_rows:
        for name in _EXTREMES:
            metrics.pop(name, None)


def put_means(trainer) -> None:
    """Log the means since the last log with TRL's metrics; all ranks call it."""
    metrics = trainer._metrics["train"]
    means = trainer._means["train"].reduce(trainer.accelerator)
    for name, (total, count) in means.items():
        if count:
            metrics[name] = [total / count]
    for name, extreme in _EXTREMES.items():
        values = [value for value in metrics.pop(name, []) if not math.isnan(value)]
        if values:
            metrics[name] = [extreme(values)]
    if trainer.importance_sampling_level == "sequence" and "clip_ratio/low_mean" in means:
        # a row is clipped or is not: the least is 1 where all are, the greatest where one is
        (low, rows), (high, _) = means["clip_ratio/low_mean"], means["clip_ratio/high_mean"]
        if rows:
            metrics["clip_ratio/low_min"] = [float(low > rows - 0.5)]
            metrics["clip_ratio/high_max"] = [float(high > 0.5)]


def greedy_success(trainer, dataset: Dataset) -> float:
    """Return the share of prompts whose greedy answer succeeds; all ranks call it."""
    size, ranks = trainer.args.per_device_eval_batch_size, trainer.accelerator.num_processes
    successes = 0
    with _without_chance(trainer):
        for start in range(0, len(dataset), size * ranks):
            own = range(start + trainer.accelerator.process_index * size, len(dataset))[:size]
            # ranks hold as many rows each; what fills up comes last and is cut off
            rows = [dataset[i] for i in own] + [dataset[0]] * (size - len(own))
            rewards = group_rewards.weighted_rewards(trainer.score_rollouts(rows), trainer.reward_weights)
            scored = success_rewards(trainer, rewards)[: len(dataset) - start]
            successes += int((scored >= trainer.args.least_success).sum())
    return successes / len(dataset)


@contextlib.contextmanager
def _without_chance(trainer):
    """Decode greedily, one answer a prompt, inside; keep its metrics, logs and rewards out of the trainer's."""
    generation = trainer.generation_config
    if generation is not None:
        generation = copy.deepcopy(generation)
        generation.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None)
    changed = {
        "generation_config": generation,
        "num_generations_eval": 1,
        # no log-probabilities of the reference are asked for
        "beta": 0.0,
        "_metrics": {mode: defaultdict(list) for mode in trainer._metrics},
        "_logs": completion_log.empty_logs(trainer),
        "_pending_extra_logs": defaultdict(list),
        "_pending_metrics": defaultdict(list),
        "_rewards": None,
    }
    before = {name: getattr(trainer, name) for name in changed}
    training = trainer.model.training
    trainer.model.eval()
    vars(trainer).update(changed)
    try:
        yield
    finally:
        vars(trainer).update(before)
        trainer.model.train(training)
