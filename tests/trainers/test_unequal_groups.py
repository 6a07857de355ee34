"""A batch whose groups have one and two answers of a side goes through the same trainer as pairs do."""

import math

import pytest
import torch
from datasets import Dataset

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.mechanisms.row_groups import CHOSEN, REJECTED, RowGroups
from posttrain.trainers.preference import reference_logps
from tests.conftest import make_pairs
from tests.training import distance, lora, settings, trainable

ROWS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [[8, 9, 10]], "rejected_ids": [[11, 12], [13, 14, 15, 16]]},
    {"prompt_ids": [17, 18], "chosen_ids": [[19], [20, 21]], "rejected_ids": [[22, 23, 24]]},
]


def collate(rows):
    """All answers of a row, chosen ones first, before those of the next."""
    tokens, scored, numbers, signs = [], [], [], []
    for number, row in enumerate(rows):
        for sign, side in ((CHOSEN, "chosen_ids"), (REJECTED, "rejected_ids")):
            for answer in row[side]:
                tokens.append(row["prompt_ids"] + answer)
                scored.append([0] * len(row["prompt_ids"]) + [1] * len(answer))
                numbers.append(number)
                signs.append(sign)
    width = max(map(len, tokens))
    pad = [width - len(row) for row in tokens]
    return {
        "input_ids": torch.tensor([row + [0] * more for row, more in zip(tokens, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * more for r, more in zip(tokens, pad, strict=True)]),
        "completion_mask": torch.tensor([row + [0] * more for row, more in zip(scored, pad, strict=True)]),
        "row_groups": RowGroups(tuple(numbers), tuple(signs)),
    }


def build(folder, output_dir, **overrides):
    trainer = RobustDPOTrainer(
        folder,
        args=RobustDPOConfig(**settings(output_dir, check_reference=False, **overrides)),
        train_dataset=make_pairs(4),
        peft_config=lora(),
    )
    # off its start, so that policy and reference differ
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return trainer


def plain_logps(model, batch, ld_alpha=None):
    """The log-probability of each answer, each row in a forward of its own, in fp64."""
    logps, groups = [], batch["row_groups"].numbers
    lengths = batch["completion_mask"].sum(dim=1).tolist()
    for row, number in enumerate(groups):
        ids = batch["input_ids"][row : row + 1, : int(batch["attention_mask"][row].sum())]
        with torch.no_grad():
            tokens = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        tokens = tokens[-lengths[row] :]
        shortest = min(own for own, other in zip(lengths, groups, strict=True) if other == number)
        tail = 1.0 if ld_alpha is None else ld_alpha
        logps.append((tokens[:shortest].sum() + tail * tokens[shortest:].sum()).item())
    return logps


@pytest.mark.parametrize("overrides", [{}, {"prefix_sharing": "never"}, {"ld_alpha": 0.25}, {"pair_loss": "ipo"}])
def test_scores_losses_and_metrics_are_those_of_a_plain_computation(overrides, tiny_folder, tmp_path):
    ipo = overrides.get("pair_loss") == "ipo"
    noise = {} if ipo else {"pair_loss": "rdpo", "flip_rate": 0.2}
    trainer = build(tiny_folder, tmp_path, **(noise | overrides))
    batch = collate(ROWS)
    policy = plain_logps(trainer.model, batch, overrides.get("ld_alpha"))
    with trainer.model.disable_adapter():
        reference = plain_logps(trainer.model, batch, overrides.get("ld_alpha"))
    # rows: one chosen and two rejected of the first group, two and one of the second
    ratios = [ours - theirs for ours, theirs in zip(policy, reference, strict=True)]
    lengths = [3, 2, 4, 1, 2, 3]
    if ipo:
        ratios = [ratio / length for ratio, length in zip(ratios, lengths, strict=True)]
    margins = [ratios[0] - (ratios[1] + ratios[2]) / 2, (ratios[3] + ratios[4]) / 2 - ratios[5]]
    if ipo:
        expected = [(margin - 0.5) ** 2 for margin in margins]
    else:
        expected = [math.log1p(math.exp(-margin)) - 0.2 / 0.6 * margin for margin in margins]
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-3)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.model.parameters())
    metrics = {}
    trainer._reduce_means(metrics)
    shown = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert shown["logps/chosen"] == pytest.approx((policy[0] + (policy[3] + policy[4]) / 2) / 2, rel=1e-4)
    assert shown["logps/rejected"] == pytest.approx(((policy[1] + policy[2]) / 2 + policy[5]) / 2, rel=1e-4)
    if not ipo:
        assert shown["rewards/margins"] == pytest.approx(sum(margins) / 2, rel=1e-3, abs=1e-4)
        assert shown["rewards/accuracies"] == sum(margin > 0 for margin in margins) / 2
    assert shown["num_tokens"] == int(batch["attention_mask"].sum())
    assert ("prefix_sharing/unshared" in shown) == ("prefix_sharing" not in overrides)


def test_reference_logps_of_several_answers_are_lists_and_come_from_the_cache(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, precompute_ref_log_probs=True)
    trainer.data_collator = collate
    dataset = Dataset.from_list(ROWS)
    first = reference_logps.precompute(trainer, dataset, "train", 2)
    with trainer.model.disable_adapter():
        plain = plain_logps(trainer.model, collate(ROWS))
    chosen, rejected = first["ref_chosen_logps"][:], first["ref_rejected_logps"][:]
    assert [len(row) for row in chosen] == [1, 2] and [len(row) for row in rejected] == [2, 1]
    assert [*chosen[0], *rejected[0], *chosen[1], *rejected[1]] == pytest.approx(plain, rel=1e-4)
    trainer.data_collator = None
    again = reference_logps.precompute(trainer, dataset, "train", 2)
    assert again["ref_chosen_logps"][:] == chosen and again["ref_rejected_logps"][:] == rejected


def test_the_update_of_unequal_groups_is_the_same_for_every_split_of_the_batch(tiny_folder, tmp_path):
    changes = []
    for batch, steps in ((6, 1), (2, 3)):
        trainer = build(
            tiny_folder, tmp_path / str(steps), reduction="dr_dpo", per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps, max_steps=1, learning_rate=0.01,
        )  # fmt: skip
        lengths = [dict(row, prompt_ids=row["prompt_ids"] * more) for more in (1, 3, 2) for row in ROWS]
        trainer.train_dataset, trainer.data_collator = Dataset.from_list(lengths), collate
        before = trainable(trainer.model)
        trainer.train()
        changes.append({name: value - before[name] for name, value in trainable(trainer.model).items()})
    assert distance(changes[1], changes[0]) < 1e-4
