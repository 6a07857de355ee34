"""Demonstrations among rollouts: tokenised once, put in the place of a rollout where a prompt's gate says so."""

import torch
from torch import Tensor

from posttrain.data.tasks.tokens import IDS
from posttrain.mechanisms import group_rewards
from posttrain.objectives import advantages
from posttrain.objectives.advantages import gate_weights, row_advantage
from posttrain.trainers.policy_gradient import reward_setup
from posttrain.trainers.policy_gradient.rollout_log import success_rewards


def replace_completions(batch: dict, rows: list[int], demonstrations: list[list[int]], pad: int) -> None:
    """Replace the completions of `rows` by demonstrations, widening the batch where they are longer."""
    if not rows:
        return
    gap = max(len(ids) for ids in demonstrations) - batch["completion_ids"].size(1)
    if gap > 0:
        width = batch["completion_ids"].size(1)
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.dim() == 2 and value.size(1) == width and "prompt" not in key:
                fill = pad if key == "completion_ids" else 1 if key in ("tool_mask", "importance_sampling_ratio") else 0
                batch[key] = torch.nn.functional.pad(value, (0, gap), value=fill)
    for row, ids in zip(rows, demonstrations, strict=True):
        batch["completion_ids"][row] = pad
        batch["completion_ids"][row, : len(ids)] = torch.tensor(ids, device=batch["completion_ids"].device)
        batch["completion_mask"][row] = 0
        batch["completion_mask"][row, : len(ids)] = 1
        for key, neutral in (("tool_mask", 1), ("importance_sampling_ratio", 1.0), ("old_per_token_logps", 0.0)):
            if key in batch:
                batch[key][row] = neutral


def insert(trainer, batch: dict, inputs: list[dict], rewards: Tensor, size: int) -> None:
    """Replace rollouts of a scored batch by demonstrations where the gates of their prompts say so.

    Args:
        batch: this rank's rollouts with their advantages; changed in place. `demonstrations` (B,) flags the rows that
            are demonstrations now, `off_policy_share` (B,) the part of their advantage that is off-policy.
        inputs: this rank's examples, with `demonstration_ids`.
        rewards: (N,) of all ranks' rollouts, NaN where unscorable.
        size: rollouts a prompt.
    """
    args, device, own = trainer.args, rewards.device, len(inputs)
    start = trainer.accelerator.process_index * own
    scores = success_rewards(trainer, rewards).view(-1, size)
    reward_setup.check_success(args, scores)
    gate = None
    if args.soft_gate is None:
        gate = advantages.success_gate(scores, args.gamma, args.least_success)
    weights = gate_weights(scores, gate, args.soft_gate, args.least_success)
    lengths = torch.tensor([len(row[IDS]) for row in inputs], device=device)
    lengths = trainer.accelerator.gather(lengths).view(-1, size)[:, 0].float()
    # a prompt without a demonstration stays with its rollouts
    weights[lengths == 0] = torch.tensor([1.0, 0.0, 0.0], device=device)
    on_policy, off_policy, sft = weights.unbind(dim=1)
    demonstrated = (off_policy > 0) | (sft > 0)

    values = trainer.accelerator.gather(batch["advantages"])
    if (off_policy > 0).any():
        # an off-policy demonstration belongs to the group that it is compared with
        filled = rewards.view(-1, size).clone()
        filled[off_policy > 0, 0] = args.least_success
        values = group_rewards.group_advantages(
            filled.view(-1), size, trainer.group_advantage, f"advantage {args.advantage}"
        )
    values = values.view(-1, size)
    off_policy = off_policy * values[:, 0]
    values = values * on_policy[:, None]

    group_of = torch.arange(start, start + own, device=device) // size
    batch["completion_mask"][on_policy[group_of] == 0] = 0
    rows = [i for i in range(own) if (start + i) % size == 0 and demonstrated[(start + i) // size]]
    replace_completions(batch, rows, [inputs[i][IDS] for i in rows], trainer._tokenizer.pad_token_id)
    loss_mask = batch["completion_mask"]
    if "tool_mask" in batch:
        loss_mask = loss_mask * batch["tool_mask"]
    batch["num_items_in_batch"] = trainer.accelerator.gather(loss_mask.sum()).sum()
    totals = {
        "rows": len(rewards),
        "group_size": size,
        "tokens": batch["num_items_in_batch"].item(),
        "demonstration_tokens": max(lengths[demonstrated].sum().item(), 1.0),
        "max_length": trainer.max_completion_length,
    }
    one = row_advantage(args.sft_normalization, args.sft_coef, trainer.loss_type, lengths.clamp(min=1), totals)
    whole = sft * one + off_policy
    values[demonstrated, 0] = whole[demonstrated]
    trainer.set_advantages(batch, values.reshape(-1))
    flags = torch.zeros(own, dtype=torch.bool, device=device)
    flags[rows] = True
    batch["demonstrations"] = flags
    batch["off_policy_share"] = flags * torch.nan_to_num(off_policy / whole)[group_of]

    metrics = trainer._metrics["train"]
    successes = (scores >= args.least_success).sum(dim=1)
    metrics["hpt/frac_sft_prompts"].append((on_policy == 0).float().mean().item())
    metrics["hpt/success_rate"].append((successes.float() / size).mean().item())
    metrics["hpt/solve_none"].append((successes == 0).float().mean().item())
    metrics["hpt/solve_all"].append((successes == size).float().mean().item())
    metrics["hpt/demo_tokens"].append(lengths[demonstrated].sum().item())
