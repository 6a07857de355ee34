"""What is measured of rollouts: success, pass@k, the quantile's two sides, and greedy answers in evaluation."""

import copy

import torch
from datasets import Dataset
from torch import Tensor

from posttrain.mechanisms import group_rewards
from posttrain.objectives import advantages


def judged(trainer, rewards: Tensor) -> Tensor:
    """The rewards (N,) that success is read from."""
    if trainer.args.success_reward is None:
        return rewards
    return trainer._rewards[:, trainer.reward_func_names.index(trainer.args.success_reward)]


def record(trainer, rewards: Tensor, size: int, mode: str) -> None:
    """Log how many of a batch's rollouts (N,) and prompts succeed."""
    metrics = trainer._metrics[mode]
    success = (judged(trainer, rewards) >= trainer.args.least_success).view(-1, size)
    metrics["rollouts/unscorable_share"].append(torch.isnan(rewards).float().mean().item())
    metrics["rollouts/pass_at_1"].append(success.float().mean().item())
    if size > 1:
        metrics[f"rollouts/pass_at_{size}"].append(success.any(dim=1).float().mean().item())


def record_quantile(trainer, rewards: Tensor, values: Tensor, mode: str) -> None:
    """Log on which side of the quantile prompts lie: `rewards` (P, G), advantages `values` (N,)."""
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


def greedy_success(trainer, dataset: Dataset) -> float:
    """The share of prompts whose most likely answer succeeds. All ranks call it."""
    size, ranks = trainer.args.per_device_eval_batch_size, trainer.accelerator.num_processes
    sampling, mode = trainer.generation_config, trainer.model.training
    trainer.generation_config = copy.deepcopy(sampling)
    trainer.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None)
    trainer.model.eval()
    successes = 0
    try:
        for start in range(0, len(dataset), size * ranks):
            own = range(start + trainer.accelerator.process_index * size, len(dataset))[:size]
            # ranks hold as many rows each; what fills up comes last and is cut off
            rows = [dataset[i] for i in own] + [dataset[0]] * (size - len(own))
            prompts = [row["prompt"] for row in rows]
            _, ids, _, completions, *_ = trainer._generate(prompts)
            trainer._calculate_rewards(rows, prompts, completions, ids)
            rewards = group_rewards.weighted_rewards(trainer._rewards, trainer.reward_weights)
            scored = judged(trainer, rewards)[: len(dataset) - start]
            successes += int((scored >= trainer.args.least_success).sum())
    finally:
        trainer.generation_config = sampling
        trainer.model.train(mode)
        trainer._metrics["eval"].clear()
    return successes / len(dataset)
