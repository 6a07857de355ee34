import pytest
import torch

from posttrain.mechanisms.group_rewards import group_advantages, pack_kept_rows, rows_with_gradient, weighted_rewards

LOSSES = {
    # TRL's reductions of one micro-batch, before the division by the number of micro-batches
    "grpo": lambda per_token, mask, total: ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean(),
    "bnpo": lambda per_token, mask, total: (per_token * mask).sum() / mask.sum().clamp(min=1),
    "dr_grpo": lambda per_token, mask, total: (per_token * mask).sum() / (per_token.size(0) * 16),
    "dapo": lambda per_token, mask, total: (per_token * mask).sum() / total,
}


def rollouts(size, batches, dead=0.75, seed=0, two_dimensional=False, tools=False):
    """Micro-batches of `size` rows, each token id its own number, so that a row is known by its tokens."""
    generator, lottery = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    result, number = [], 1
    for _ in range(batches):
        prompts, lengths = (
            torch.randint(1, 6, (size,), generator=generator),
            torch.randint(1, 9, (size,), generator=generator),
        )
        prompt_mask = (torch.arange(5).flip(0) < prompts.unsqueeze(1)).long()
        completion_mask = (torch.arange(8) < lengths.unsqueeze(1)).long()
        ids = torch.arange(number, number + size * 8).view(size, 8)
        number += size * 8
        advantages = torch.randn(size, generator=generator)
        advantages[torch.rand(size, generator=lottery) < dead] = 0.0
        if two_dimensional:
            advantages = advantages.unsqueeze(1) * torch.rand(size, 8, generator=generator)
        batch = {
            "prompt_ids": prompt_mask * 7,
            "prompt_mask": prompt_mask,
            "completion_ids": ids,
            "completion_mask": completion_mask,
            "old_per_token_logps": torch.randn(size, 8, generator=generator),
            "advantages": advantages,
            "num_items_in_batch": torch.tensor(50.0),
        }
        if tools:
            batch["tool_mask"] = (torch.rand(size, 8, generator=generator) < 0.7).long()
        result.append(batch)
    return result


def gradient(batches, loss_type, vocabulary=2000):
    """d loss / d logp by token id, for log-probs that depend on the token alone, ratio clipping included."""
    table = torch.linspace(-3, -0.5, vocabulary).requires_grad_()
    for batch in batches:
        logps, mask = table[batch["completion_ids"]], batch["completion_mask"]
        mask = mask * batch["tool_mask"] if "tool_mask" in batch else mask
        ratio = torch.exp(logps - batch["old_per_token_logps"])
        advantages = batch["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        per_token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        (LOSSES[loss_type](per_token, mask, batch["num_items_in_batch"]) / len(batches)).backward()
    return table.grad


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("form", ["rows", "tokens", "tools"])
def test_packing_leaves_the_gradient_as_it_was(size, loss_type, form):
    batches = rollouts(size, 16 // size, two_dimensional=form == "tokens", tools=form == "tools")
    before = gradient(batches, loss_type)
    packed = pack_kept_rows(batches, loss_type)
    assert before.abs().max() > 0
    torch.testing.assert_close(gradient(packed, loss_type), before, rtol=1e-5, atol=1e-8)
    assert len(packed) == len(batches)
    kept = sum(int(rows_with_gradient(batch).sum()) for batch in packed)
    assert kept == sum(int(rows_with_gradient(batch).sum()) for batch in batches) < 16
    forwarded = sum(batch["completion_ids"].size(0) for batch in packed)
    assert forwarded == kept + sum(not rows_with_gradient(batch).any() for batch in packed)


def test_without_the_scaling_the_gradient_would_be_another():
    batches = rollouts(8, 2)
    packed = pack_kept_rows(batches, "dapo")
    assert (gradient(packed, "grpo") - gradient(batches, "grpo")).norm() > 0.1 * gradient(batches, "grpo").norm()


def test_a_step_without_a_living_row_forwards_a_few_tokens():
    packed = pack_kept_rows(rollouts(4, 3, dead=1.1), "grpo")
    for batch in packed:
        # two: values of width 1 would be a row's in TRL's metrics
        assert batch["completion_ids"].shape == (1, 2) and batch["prompt_ids"].shape == (1, 1)
        assert batch["completion_mask"].sum() == 0 and batch["prompt_mask"].sum() == 1


def test_ranks_agree_on_the_rows_of_each_micro_batch():
    batches = rollouts(4, 3, dead=0.8)
    living = sum(int(rows_with_gradient(batch).sum()) for batch in batches)
    alone, beside = pack_kept_rows(batches, "grpo"), pack_kept_rows(batches, "grpo", max_over_ranks=lambda own: own + 3)
    assert [len(b["advantages"]) for b in alone] != [len(b["advantages"]) for b in beside]
    assert sum(len(b["advantages"]) for b in beside if len(b["advantages"]) > 1) >= living + 3
    torch.testing.assert_close(gradient(beside, "grpo"), gradient(batches, "grpo"), rtol=1e-5, atol=1e-8)


def test_prompts_of_other_widths_keep_their_padding_on_the_left():
    first, second = rollouts(2, 2, dead=-1)
    for key in ("prompt_ids", "prompt_mask"):
        first[key] = torch.nn.functional.pad(first[key], (3, 0))
    for key in ("completion_ids", "completion_mask", "old_per_token_logps"):
        second[key] = torch.nn.functional.pad(second[key], (0, 4))
    packed = pack_kept_rows([first, second], "grpo")
    tokens = torch.cat([batch["completion_ids"][batch["completion_mask"].bool()] for batch in packed])
    expected = torch.cat([batch["completion_ids"][batch["completion_mask"].bool()] for batch in (first, second)])
    assert torch.equal(tokens, expected)
    assert all(bool(batch["prompt_mask"][:, -1].all()) for batch in packed)


def of_prompts(size, batches, prompts, seed=0, **given):
    """`rollouts` of so many prompts, equally often each, dealt at random."""
    made = rollouts(size, batches, seed=seed, **given)
    own = torch.arange(size * batches)[torch.randperm(size * batches, generator=torch.Generator().manual_seed(seed))]
    for batch, numbers in zip(made, own.split(size), strict=True):
        batch["prompt_mask"] = torch.ones(size, 5, dtype=torch.long)
        # the first tokens differ, so that one that only looked at the last would not tell them apart
        batch["prompt_ids"] = torch.stack([numbers % prompts + 1, *[torch.full((size,), 7)] * 4], dim=1)
    return made


def prompts_of(batches):
    return [len(set(batch["prompt_ids"][batch["completion_mask"].any(1)][:, 0].tolist())) for batch in batches]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("dead", [-1, 0.4])
def test_rows_of_a_prompt_stay_together_and_the_gradient_as_it_was(loss_type, dead):
    batches = of_prompts(4, 4, prompts=4, dead=dead)
    packed = pack_kept_rows(batches, loss_type, by_prompt=True)
    torch.testing.assert_close(gradient(packed, loss_type), gradient(batches, loss_type), rtol=1e-5, atol=1e-8)
    scattered = pack_kept_rows(batches, loss_type)
    assert [len(b["advantages"]) for b in packed] == [len(b["advantages"]) for b in scattered]
    assert sum(prompts_of(packed)) < sum(prompts_of(scattered))
    if dead < 0:
        assert prompts_of(packed) == [1, 1, 1, 1]
    # a rank of other prompts has as many rows in each micro-batch
    other = pack_kept_rows(of_prompts(4, 4, prompts=2, dead=dead), loss_type, by_prompt=True)
    assert [len(b["advantages"]) for b in other] == [len(b["advantages"]) for b in packed]


def test_padding_of_a_prompt_is_no_part_of_it():
    first, second = of_prompts(2, 2, prompts=2, dead=-1)
    for batch, garbage in ((first, 0), (second, 3)):
        for key, value in (("prompt_ids", garbage), ("prompt_mask", 0)):
            batch[key] = torch.nn.functional.pad(batch[key], (2, 0), value=value)
    assert prompts_of_wide(pack_kept_rows([first, second], "grpo", by_prompt=True)) == [1, 1]


def prompts_of_wide(batches):
    return [len(set(batch["prompt_ids"][:, -5].tolist())) for batch in batches]


def test_an_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="loss_type 'ppo' is not one of bnpo"):
        pack_kept_rows(rollouts(2, 1), "ppo")


def test_rewards_are_weighted_and_unscorable_ones_stay_so():
    per_function = torch.tensor([[1.0, 0.5], [torch.nan, 2.0], [torch.nan, torch.nan]])
    rewards = weighted_rewards(per_function, torch.tensor([1.0, 2.0]))
    assert rewards[:2].tolist() == [2.0, 4.0] and torch.isnan(rewards[2])


def test_any_function_of_a_groups_rewards_is_an_advantage():
    rewards = torch.tensor([1.0, 2.0, torch.nan, 4.0])
    assert group_advantages(rewards, 2, lambda r: r - 1).tolist() == [0.0, 1.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda r: r.sum(dim=1), r"returned \(2,\) for rewards of shape \(2, 2\)"),
        (lambda r: r.tolist(), "returned list for rewards"),
        (lambda r: r / 0.0, "NaN or infinity for a reward that is a number"),
    ],
)
def test_an_advantage_of_another_shape_or_not_finite_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2, function)
