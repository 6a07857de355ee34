"""What preference trainers log of a batch of pairs: rewards, log-probabilities, tokens."""

import torch
from torch import Tensor

from posttrain.mechanisms.row_groups import CHOSEN, REJECTED
from posttrain.run.sharing import record_padding


def record(
    trainer, mode: str, scores, chosen_logratios: Tensor, rejected_logratios: Tensor, losses: Tensor, inputs: dict
) -> None:
    """Add a micro-batch's metrics to the sums of its mode, "train" or "eval".

    Args:
        scores: the policy's `PairLogps`. chosen_logratios, rejected_logratios: less the reference, in nats, (C,), (D,).
        losses: of the groups, (B,). inputs: the batch.
    """
    means, groups = trainer._means[mode], trainer.groups_of(inputs)
    real = trainer.told_rows(trainer.is_real(inputs), losses)
    chosen, rejected = groups.mean(chosen_logratios, CHOSEN), groups.mean(rejected_logratios, REJECTED)
    chosen_rewards, rejected_rewards = trainer.beta * chosen, trainer.beta * rejected
    for name, values in (
        ("rewards/chosen", chosen_rewards),
        ("rewards/rejected", rejected_rewards),
        ("rewards/accuracies", (chosen_rewards > rejected_rewards).float()),
        ("rewards/margins", chosen_rewards - rejected_rewards),
        ("logps/chosen", groups.mean(scores.chosen_logps, CHOSEN)),
        ("logps/rejected", groups.mean(scores.rejected_logps, REJECTED)),
    ):
        means.add(name, values, real)
    real_rows = groups.to_rows(real)
    tokens = scores.shift_mask.bool() & real_rows.unsqueeze(1)
    width, outputs = tokens.size(1), scores.outputs
    chosen_tokens, rejected_tokens = groups.split(tokens)
    if outputs.entropy is not None:
        means.add("entropy", outputs.entropy[:, -width:], tokens)
    if outputs.mean_logits is not None:
        chosen_logits, rejected_logits = groups.split(outputs.mean_logits[:, -width:])
        means.add("logits/chosen", chosen_logits, chosen_tokens)
        means.add("logits/rejected", rejected_logits, rejected_tokens)
    if outputs.is_top1 is not None:
        chosen_is_top1, _ = groups.split(outputs.is_top1[:, -width:])
        means.add("mean_token_accuracy", chosen_is_top1.float(), chosen_tokens)
    if mode == "train":
        means.add_sum("num_tokens", (inputs["attention_mask"].sum(dim=1) * real_rows).sum().float(), 1)
        packed = inputs.get("packed")
        record_padding(means, inputs["attention_mask"], packed)
        if packed is not None:
            unshared = torch.full((), packed.unshared, dtype=torch.float32, device=trainer.accelerator.device)
            means.add_sum("prefix_sharing/unshared", unshared, groups.count)
    trainer.extra_metrics(means, losses, chosen - rejected, inputs, mode)
