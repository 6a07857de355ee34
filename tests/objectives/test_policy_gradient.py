"""The estimator against TRL's own loss, against plain autograd, and against golden numbers computed apart from it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from posttrain.models import tiny_model
from posttrain.objectives.advantages import (
    demonstration_advantage,
    group_mean_advantage,
    quantile_advantage,
    success_gate,
)
from posttrain.objectives.estimators import SOURCES
from posttrain.objectives.policy_gradient import (
    PRESETS,
    Estimator,
    aggregate,
    equivalent_old_logps,
    gradient_weight,
    likelihood_shaping,
    parts_table,
    per_token_loss,
    reference_ratio,
    stability_mask,
)

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "policy_gradient.md"
MAX_LENGTH = 12
LENGTHS = [12, 3, 7, 1, 9, 5, 12, 0]
IN_TRL = ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "qae", "hpt_rollouts"]


def batch(seed=0, dtype=torch.float32, drift=0.4):
    """Eight rows of uneven lengths, one without a token; a reference that has drifted; one advantage a row."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), MAX_LENGTH)
    logps = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    reference = logps + drift * torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.arange(MAX_LENGTH)[None] < torch.tensor(LENGTHS)[:, None]
    advantages = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    return logps.to(dtype), reference.to(dtype), mask, advantages.to(dtype)


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected, atol=tolerance, rtol=0)


def value_and_gradient(loss, logps):
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.detach(), gradient


def ours(estimator, logps, reference, mask, advantages, **totals):
    leaf = logps.clone().requires_grad_()
    loss = aggregate(per_token_loss(leaf, reference, mask, advantages, estimator), mask, estimator, **totals)
    return value_and_gradient(loss, leaf)


def trl_settings(estimator):
    """The settings of a GRPOConfig that say the same as an estimator of TRL's kind."""
    settings = {
        "loss_type": {"row_mean": "grpo", "token_mean": "dapo", "dr_grpo": "dr_grpo"}[estimator.aggregate],
        "importance_sampling_level": estimator.level,
        "scale_rewards": estimator.scale,
    }
    if estimator.stability == "none":
        settings |= {"epsilon": math.inf, "epsilon_high": math.inf}
    elif estimator.stability == "clip":
        settings |= {"epsilon": 1 - estimator.ratio_min, "epsilon_high": estimator.ratio_max - 1}
    else:
        settings |= {"loss_type": "cispo", "epsilon_high": estimator.ratio_max}
    return settings | {"delta": estimator.delta}


def reward(completions, **columns):
    return [float(sum(text.encode()) % 7) for text in completions]


@pytest.fixture(scope="module")
def make_trainer(tmp_path_factory, tokenizer):
    model = tiny_model()

    def make(**settings):
        return GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": "ab"}, {"prompt": "cde"}]),
            args=GRPOConfig(
                output_dir=str(tmp_path_factory.mktemp("grpo")),
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=MAX_LENGTH,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
                **settings,
            ),
        )

    return make


def trls(trainer, logps, old, mask, advantages):
    """Loss of TRL's `_compute_loss` and its gradient by the log-probabilities that its forward would have returned."""
    leaf = logps.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (leaf, torch.zeros_like(leaf), None)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rows = leaf.shape[0]
    inputs = {
        "prompt_ids": torch.ones(rows, 2, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 2, dtype=torch.long),
        "completion_ids": torch.ones(rows, MAX_LENGTH, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": old,
    }
    return value_and_gradient(trainer._compute_loss(trainer.model, inputs), leaf)


@pytest.mark.parametrize("name", IN_TRL)
def test_presets_are_trls_loss(make_trainer, name):
    estimator = PRESETS[name]
    trainer = make_trainer(**trl_settings(estimator))
    for seed in range(5):
        # GSPO's range is narrow, and a geometric mean moves less than a token
        logps, old, mask, advantages = batch(seed, drift={"gspo": 2e-3, "cispo": 1.5}.get(name, 0.4))
        loss, gradient = ours(estimator, logps, old, mask, advantages, max_length=MAX_LENGTH)
        their_loss, their_gradient = trls(trainer, logps, old, mask, advantages)
        torch.testing.assert_close(loss, their_loss, atol=0, rtol=1e-6)
        torch.testing.assert_close(gradient, their_gradient, atol=1e-9, rtol=1e-6)
        factors = stability_mask(reference_ratio(logps, old, mask, estimator), advantages, estimator)[mask]
        assert (factors < 1).any() == (estimator.stability != "none"), "the bounds never acted"
    # a sampler without old log-probabilities is the policy itself
    loss, gradient = ours(estimator, logps, None, mask, advantages, max_length=MAX_LENGTH)
    their_loss, their_gradient = trls(trainer, logps, None, mask, advantages)
    torch.testing.assert_close(loss, their_loss, atol=0, rtol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, atol=1e-9, rtol=1e-6)


def test_token_values_are_trls_bit_for_bit(make_trainer):
    # with one row of one token every mean is over one number, so the loss shows the token's own value
    for name in ("grpo", "dapo", "cispo", "gspo", "hpt_rollouts"):
        trainer = make_trainer(**trl_settings(replace(PRESETS[name], aggregate="row_mean")))
        logps, old, _, advantages = batch(3)
        mask = torch.zeros(1, MAX_LENGTH, dtype=torch.bool)
        mask[:, 0] = True
        for row in range(8):
            inputs = logps[row : row + 1], old[row : row + 1], mask, advantages[row : row + 1]
            assert torch.equal(per_token_loss(*inputs, PRESETS[name]).sum(), trls(trainer, *inputs)[0])


def test_delta_and_advantages_per_token_are_trls(make_trainer):
    estimator = replace(PRESETS["dapo"], delta=1.5)
    trainer = make_trainer(**trl_settings(estimator))
    logps, old, mask, _ = batch(1)
    advantages = torch.randn(logps.shape, generator=torch.Generator().manual_seed(5))
    expected = trls(trainer, logps, old, mask, advantages)
    loss, gradient = ours(estimator, logps, old, mask, advantages)
    torch.testing.assert_close(loss, expected[0], atol=0, rtol=1e-6)
    torch.testing.assert_close(gradient, expected[1], atol=1e-9, rtol=1e-6)
    without = ours(PRESETS["dapo"], logps, old, mask, advantages)[1]
    assert (without - gradient).norm() > 0.1 * gradient.norm(), "delta never acted"


@pytest.mark.parametrize("name", PRESETS)
def test_any_preset_trains_through_trls_unclipped_loss(make_trainer, name):
    estimator = replace(PRESETS[name], aggregate="dr_grpo")
    trainer = make_trainer(loss_type="dr_grpo", epsilon=math.inf, epsilon_high=math.inf)
    logps, reference, mask, advantages = batch(2)
    old = equivalent_old_logps(logps, reference, mask, advantages, estimator)
    their_gradient = trls(trainer, logps, old, mask, advantages)[1]
    gradient = ours(estimator, logps, reference, mask, advantages, max_length=MAX_LENGTH)[1]
    torch.testing.assert_close(their_gradient, gradient, atol=1e-9, rtol=2e-6)
    assert gradient.norm() > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_mean_is_what_a_real_generation_step_computes(make_trainer, scale):
    trainer = make_trainer(scale_rewards=scale, temperature=1.0)
    trainer.model.train()
    output = trainer._generate_and_score_completions([{"prompt": "ab"}] * 4 + [{"prompt": "cde"}] * 4)
    rewards = torch.tensor(list(trainer._logs["rewards"]["reward"])).view(2, 4)
    assert rewards.std(dim=1).min() > 0
    assert torch.equal(output["advantages"], group_mean_advantage(rewards, scale).flatten())
    assert not torch.equal(output["advantages"], quantile_advantage(rewards, 0.4, scale).flatten())


def plain_surrogates(logps, reference, advantages, mask):
    """Each method's loss written by hand for plain autograd, a value a token; row sums are what is compared."""
    a = advantages[:, None]
    p, ratio = logps.exp(), (logps - reference).exp()
    sequence = (((logps - reference) * mask).sum(-1) / mask.sum(-1).clamp(min=1)).exp()[:, None].expand_as(logps)
    product = ((logps - reference) * mask).sum(-1).exp()[:, None].detach()

    def ppo(r, low, high):
        return -torch.min(r * a, r.clamp(low, high) * a)

    return {
        "sft": -logps * a,
        "reinforce": -logps * a,
        "grpo": ppo(ratio, 0.8, 1.2),
        "dapo": ppo(ratio, 0.8, 1.28),
        "qae": ppo(ratio, 0.8, 1.28),
        "dr_grpo": ppo(ratio, 0.8, 1.2),
        "gspo": ppo(sequence, 0.9997, 1.0004),
        "cispo": -ratio.detach().clamp(max=5.0) * a * logps,
        "srft_offline": -p * a,
        "luffy_offline": -p / (p + 0.1) * a,
        "hpt_rollouts": -ratio * a,
        "hpt_demonstrations": -logps * a,
        "wbc": -logps * a,
        "r_gold": -p.detach().clamp(min=0.1) * a * logps,
        "r_lol": -product.clamp(0.1, 1.9) * a * logps,
        "a_lol": -product.clamp(0.1, 1.9) * a * logps,
        "a_lol_seq": -ratio.detach().clamp(0.1, 1.9) * a * logps,
        "a_lol_ref_free": -logps * a,
        "a_lol_kl": -logps * a,
    }


@pytest.mark.parametrize("name", PRESETS)
def test_value_and_gradient_are_the_hand_written_surrogates(name):
    logps, reference, mask, advantages = batch(4, torch.float64, drift=2e-3 if name == "gspo" else 0.8)
    leaf = logps.clone().requires_grad_()
    by_hand = plain_surrogates(leaf, reference, advantages, mask)[name] * mask
    theirs = value_and_gradient(by_hand.sum(), leaf)[1]
    per_token = per_token_loss(leaf, reference, mask, advantages, PRESETS[name])
    close(per_token, by_hand.detach())
    close(value_and_gradient(per_token.sum(), leaf)[1], theirs)


@pytest.mark.parametrize("name", PRESETS)
def test_the_gradient_is_the_product_of_the_four_parts(name):
    estimator = PRESETS[name]
    logps, reference, mask, advantages = batch(5, torch.float64, drift=2e-3 if name == "gspo" else 0.8)
    leaf = logps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(per_token_loss(leaf, reference, mask, advantages, estimator).sum(), leaf)
    ratio = reference_ratio(logps, reference, mask, estimator)
    stable = stability_mask(ratio, advantages, estimator)
    product = stable * ratio * advantages[:, None] * likelihood_shaping(logps, estimator) * mask
    close(gradient, -product)
    close(gradient_weight(logps, reference, mask, advantages, estimator) * advantages[:, None], product)


def test_luffy_shaping_golden_numbers():
    probabilities = torch.tensor([[0.01, 0.05, 0.1, 0.5, 0.9]], dtype=torch.float64)
    mask, ones = torch.ones(1, 5, dtype=torch.bool), torch.ones(1, dtype=torch.float64)

    def weights(name):
        return gradient_weight(probabilities.log(), None, mask, ones, PRESETS[name])

    close(weights("luffy_offline"), [[0.082645, 0.222222, 0.25, 0.138889, 0.09]], 5e-7)
    close(weights("srft_offline"), probabilities)
    close(weights("sft"), torch.ones(1, 5))
    close(weights("r_gold"), [[0.1, 0.1, 0.1, 0.5, 0.9]])


A_LOL = {
    "logps": torch.tensor([[-1, -0.5, -2], [-0.3, -0.7, math.nan]], dtype=torch.float64),
    "reference": torch.tensor([[-1.2, -0.9, -1.5], [-0.6, -0.4, math.nan]], dtype=torch.float64),
    "mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
}


@pytest.mark.parametrize(
    ("name", "epsilon", "rewards", "loss", "gradient"),
    [
        ("wbc", None, (0.9, 0.7), 1.925, [[-0.45] * 3, [-0.35] * 2 + [0]]),
        ("r_gold", None, (0.9, 0.7), 0.623266, None),
        ("r_lol", 0.9, (0.9, 0.7), 2.09064420, [[-0.49732691] * 3, [-0.35] * 2 + [0]]),
        ("a_lol_ref_free", None, (0.9, 0.7), 0.6, [[-0.15] * 3, [-0.075] * 2 + [0]]),
        ("a_lol", 0.9, (0.9, 0.7), 0.65521473, [[-0.16577564] * 3, [-0.075] * 2 + [0]]),
        ("a_lol", 0.2, (0.9, 0.7), 0.65521473, [[-0.16577564] * 3, [-0.075] * 2 + [0]]),
        (
            "a_lol_seq",
            0.9,
            (0.9, 0.7),
            0.54632124,
            [[-0.18321041, -0.22377370, -0.09097960], [-0.10123941, -0.05556137, 0]],
        ),
        ("a_lol_seq", 0.2, (0.9, 0.7), 0.579, [[-0.18, -0.18, -0.12], [-0.09, -0.06, 0]]),
        ("a_lol_kl", None, (0.9, 0.7), 0.6025, [[-0.125] * 3, [-0.05] * 2 + [0]]),
        ("a_lol", 0.9, (0.9, 0.4), 0.58021473, None),
        ("a_lol_ref_free", None, (0.9, 0.4), 0.525, None),
        ("a_lol_seq", 0.9, (0.9, 0.4), 0.47705646, None),
        ("a_lol_kl", None, (0.9, 0.4), 0.5275, [[-0.125] * 3, [0.025] * 2 + [0]]),
    ],
)
def test_a_lol_golden_numbers(name, epsilon, rewards, loss, gradient):
    estimator = PRESETS[name]
    if epsilon is not None:
        estimator = replace(estimator, ratio_min=1 - epsilon, ratio_max=1 + epsilon)
    reward, value, beta = torch.tensor(rewards, dtype=torch.float64), torch.tensor([0.6, 0.55]).double(), 0.05
    positive = (reward - torch.tensor([0.6, 0.55], dtype=torch.float64)).clamp(min=0)
    advantages = {"reward": reward, "positive": positive, "positive_minus_beta": positive - beta}[estimator.advantage]
    value, slopes = ours(estimator, A_LOL["logps"], A_LOL["reference"], A_LOL["mask"], advantages)
    if name == "a_lol_kl":
        # what the estimator leaves out of beta * sum_t (logp - ref) has no gradient
        value = value - beta * A_LOL["reference"].nansum() / 2
    close(value, loss, 5e-7 if name == "r_gold" else 5e-9)
    if gradient is not None:
        close(slopes, gradient, 5e-9)


def test_a_lol_limits():
    logps, reference, mask, advantages = batch(6, torch.float64)
    on_reference = per_token_loss(logps, logps, mask, advantages, PRESETS["a_lol"])
    assert torch.equal(on_reference, per_token_loss(logps, None, mask, advantages, PRESETS["a_lol_ref_free"]))
    ones = torch.ones_like(advantages)
    sft = per_token_loss(logps, None, mask, ones, PRESETS["sft"])
    assert torch.equal(sft, -logps * mask)
    assert torch.equal(per_token_loss(logps, None, mask, ones, PRESETS["a_lol_ref_free"]), sft)


LENGTHS_HPT = [3, 2, 4, 1]
DEMO = torch.tensor([-0.9, -1.1, -0.4, -2.0, -0.6], dtype=torch.float64)


def hpt_batch():
    """Two prompts of four rows, L_max 8: one learns by RL, the other from the demonstration in its first row."""
    lengths = torch.tensor(LENGTHS_HPT + [5, 0, 0, 0])
    mask = torch.arange(8)[None] < lengths[:, None]
    logps = torch.full((8, 8), -0.7, dtype=torch.float64)
    logps[4, :5] = DEMO
    rewards = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.float64)
    gate = success_gate(rewards, 0.0)
    assert gate.tolist() == [False, True]
    advantages = group_mean_advantage(rewards, "none").masked_fill(gate[:, None], 0.0).flatten()
    return logps, mask, advantages


def hpt_loss(logps, old, mask, advantages, demonstrations):
    per_token = torch.where(
        demonstrations[:, None],
        per_token_loss(logps, None, mask, advantages, PRESETS["hpt_demonstrations"]),
        per_token_loss(logps, old, mask, advantages, PRESETS["hpt_rollouts"]),
    )
    return aggregate(per_token, mask, PRESETS["hpt_rollouts"], max_length=8)


def test_hpt_rollouts_golden_numbers():
    logps, mask, advantages = hpt_batch()
    close(advantages[:4], [0.5, -0.5, -0.5, 0.5])
    loss, gradient = ours(PRESETS["hpt_rollouts"], logps[:4], logps[:4], mask[:4], advantages[:4], max_length=8)
    close(loss, 0.03125)
    close(gradient, -0.015625 * torch.tensor([[1], [-1], [-1], [1]]) * mask[:4])


@pytest.mark.parametrize(
    ("normalization", "advantage", "demo_loss", "demo_gradient"),
    [("unified", 1.0, 0.078125, -0.015625), ("prompt", 6.4, 0.5, -0.1), ("token", 12.8, 1.0, -0.2)],
)
def test_hpt_golden_numbers_of_both_kinds_of_rows(normalization, advantage, demo_loss, demo_gradient):
    logps, mask, advantages = hpt_batch()
    weight = demonstration_advantage(
        normalization, group_size=4, max_length=8, demo_tokens=5, total_rows=8, total_demo_tokens=5
    )
    assert weight == pytest.approx(advantage, rel=1e-12)
    advantages[4] = weight
    leaf = logps.clone().requires_grad_()
    demonstrations = torch.arange(8) == 4
    # the demonstration's old log-probabilities are those of the rollout it replaced: they must not matter
    stale = torch.where(demonstrations[:, None], logps + 3.0, logps)
    loss, gradient = value_and_gradient(hpt_loss(leaf, stale, mask, advantages, demonstrations), leaf)
    close(loss, 0.03125 / 2 + demo_loss)
    if normalization == "prompt":
        close(loss, 0.515625)
    close(gradient[4, :5], [demo_gradient] * 5)
    close(gradient[:4], -0.0078125 * torch.tensor([[1], [-1], [-1], [1]]) * mask[:4])
    assert gradient[5:].eq(0).all() and gradient[~mask].eq(0).all()


def test_hpt_through_trls_loss_is_the_same_gradient(make_trainer):
    trainer = make_trainer(loss_type="dr_grpo", epsilon=math.inf, epsilon_high=math.inf)
    logps, mask, advantages = hpt_batch()
    advantages[4] = demonstration_advantage("unified", 0.3)
    demonstrations = torch.arange(8) == 4
    old = logps + 0.3 * torch.randn(logps.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide = [torch.nn.functional.pad(t, (0, MAX_LENGTH - 8)) for t in (logps, old, mask)]
    seam = equivalent_old_logps(wide[0], None, wide[2], advantages, PRESETS["hpt_demonstrations"])
    assert torch.equal(seam, wide[0])
    seam = torch.where(demonstrations[:, None], seam, wide[1])
    their_gradient = trls(trainer, wide[0], seam, wide[2], advantages)[1][:, :8]
    leaf = logps.clone().requires_grad_()
    gradient = value_and_gradient(hpt_loss(leaf, old, mask, advantages, demonstrations), leaf)[1]
    close(their_gradient * MAX_LENGTH / 8, gradient)


def test_demonstration_advantages():
    assert demonstration_advantage() == 1.0
    assert demonstration_advantage("unified", 0.3) == 0.3
    lengths = torch.tensor([5, 8], dtype=torch.float64)
    close(demonstration_advantage("prompt", 0.5, group_size=4, max_length=8, demo_tokens=lengths), [3.2, 2])
    assert demonstration_advantage("token", 1.0, max_length=8, total_rows=16, total_demo_tokens=32) == 4.0
    with pytest.raises(ValueError, match="sft_normalization is 'row'; allowed are unified, prompt, token"):
        demonstration_advantage("row")
    with pytest.raises(ValueError, match="sft_coef is -1; it must be finite and not negative"):
        demonstration_advantage(sft_coef=-1)
    with pytest.raises(ValueError, match="demo_tokens is 0; sft_normalization 'prompt' needs it, 1 or more"):
        demonstration_advantage("prompt", group_size=4, max_length=8, demo_tokens=0)
    with pytest.raises(ValueError, match="total_rows is None; sft_normalization 'token' needs it"):
        demonstration_advantage("token", max_length=8, total_demo_tokens=5)


def test_hpt_rollouts_are_dr_grpo_until_the_clip_acts():
    logps, old, mask, advantages = batch(7, drift=0.01)

    def both(reference):
        settings = dict(max_length=MAX_LENGTH)
        return [ours(PRESETS[n], logps, reference, mask, advantages, **settings) for n in ("dr_grpo", "hpt_rollouts")]

    for mine, theirs in zip(*both(old), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(*(gradient for _, gradient in both(batch(7)[1])))


@pytest.mark.parametrize("name", PRESETS)
def test_padding_and_zero_advantages_never_enter(name):
    estimator = PRESETS[name]
    logps, reference, mask, advantages = batch(8)
    advantages[0] = 0.0
    expected = ours(estimator, logps, reference, mask, advantages, max_length=MAX_LENGTH)
    garbage = [torch.where(mask, t, bad) for t, bad in ((logps, math.inf), (reference, math.nan))]
    # a row without advantage may have any ratio, one that overflows included
    garbage[1][0] = -1e4
    assert per_token_loss(*garbage, mask, advantages, estimator)[~mask].eq(0).all()
    actual = ours(estimator, *garbage, mask, advantages, max_length=MAX_LENGTH)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    assert expected[1][0].eq(0).all() and expected[1][~mask].eq(0).all() and expected[1].ne(0).any()


@pytest.mark.parametrize("name", PRESETS)
def test_one_step_is_the_same_for_every_split_into_micro_batches(name):
    estimator = PRESETS[name]
    logps, reference, mask, advantages = batch(9, torch.float64)
    loss, gradient = ours(estimator, logps, reference, mask, advantages, max_length=MAX_LENGTH)
    totals = dict(max_length=MAX_LENGTH, total_tokens=mask.sum(), total_rows=8)
    for split in (1, 3, 8):
        parts = [
            ours(estimator, *(t[start : start + split] for t in (logps, reference, mask, advantages)), **totals)
            for start in range(0, 8, split)
        ]
        close(sum(value for value, _ in parts), loss)
        close(torch.cat([slope for _, slope in parts]), gradient)


def test_aggregates_of_a_small_example():
    per_token, mask = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    # tokens: (1 + 2 + 4) / 3; rows: (1.5 + 4) / 2; sums: (3 + 4) / 2; dr_grpo: 7 / (2 * 5)
    for name, value in [("token_mean", 7 / 3), ("row_mean", 2.75), ("row_sum", 3.5), ("dr_grpo", 0.7)]:
        close(aggregate(per_token, mask, Estimator(aggregate=name), max_length=5), value, 1e-6)
    assert aggregate(per_token, torch.zeros_like(mask), Estimator()) == 0
    with pytest.raises(ValueError, match="max_length is None; aggregate 'dr_grpo' divides by it"):
        aggregate(per_token, mask, Estimator(aggregate="dr_grpo"))


def test_ratios_that_overflow_stay_out_of_clipped_gradients():
    logps, mask = torch.zeros(2, MAX_LENGTH), torch.ones(2, MAX_LENGTH, dtype=torch.bool)
    old, advantages = torch.full_like(logps, -200.0), torch.tensor([1.0, 1.0])
    assert reference_ratio(logps, old, mask, PRESETS["grpo"]).isinf().all()
    for name, slope in [("grpo", 0.0), ("cispo", -5.0), ("a_lol", -1.9), ("a_lol_seq", -1.9)]:
        estimator = replace(PRESETS[name], aggregate="row_sum")
        loss, gradient = ours(estimator, logps, old, mask, advantages)
        assert loss.isfinite()
        close(gradient, torch.full((2, MAX_LENGTH), slope / 2), 1e-6)
        seam = equivalent_old_logps(logps, old, mask, advantages, estimator)
        close((logps - seam).exp(), torch.full((2, MAX_LENGTH), -slope), 1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_a_ratio_that_overflows_is_infinity_and_not_nan(name):
    logps = torch.tensor([[-1.0, 0.0]] * 2, requires_grad=True)
    old, mask = torch.full((2, 2), -1e4), torch.ones(2, 2, dtype=torch.bool)
    losses = per_token_loss(logps, old, mask, torch.tensor([-1.0, 1.0]), PRESETS[name])
    losses.sum().backward()
    assert not losses.isnan().any() and logps.grad.isfinite().all()
    if name == "grpo":
        # pushed down without bound, pushed up no further
        assert losses[0].eq(math.inf).all() and losses[1].isfinite().all()
        assert logps.grad[0].gt(1e38).all() and logps.grad[1].eq(0).all()


def test_low_precision_is_widened():
    logps, reference, mask, advantages = batch(10)
    for name in PRESETS:
        half = logps.bfloat16()
        actual = per_token_loss(half, reference, mask, advantages, PRESETS[name])
        assert actual.dtype == torch.float32
        assert torch.equal(actual, per_token_loss(half.float(), reference, mask, advantages, PRESETS[name]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "ref"}, "reference is 'ref'; allowed are policy, old, frozen, one"),
        ({"level": "answer"}, "level is 'answer'; allowed are token, sequence, product"),
        ({"advantage": "gae"}, "advantage is 'gae'; allowed are one, sign, reward, group_mean"),
        ({"aggregate": "mean"}, "aggregate is 'mean'; allowed are token_mean, row_mean, row_sum, dr_grpo"),
        ({"shaping": "gold"}, "shaping is 'gold'; allowed are none, luffy"),
        ({"ratio_max": 1.2}, "ratio_max is 1.2 with stability 'none'; bounds need stability 'clip' or 'clamp'"),
        ({"stability": "clip", "ratio_max": 1.2}, "ratio_min is None, ratio_max is 1.2, .*ratio_min <= 1 <= ratio_max"),
        ({"stability": "clip", "ratio_min": 1.1, "ratio_max": 1.2}, "ratio_min is 1.1.*ratio_min <= 1 <= ratio_max"),
        ({"stability": "clip", "ratio_min": 0.8, "ratio_max": 1.2, "delta": 1.1}, "delta must be above ratio_max"),
        ({"stability": "clamp"}, "stability 'clamp' needs ratio_min, ratio_max or both"),
        ({"stability": "clamp", "ratio_min": 2.0, "ratio_max": 1.0}, "0 <= ratio_min < ratio_max"),
        ({"advantage": "reward", "scale": "group"}, "scale is 'group' with advantage 'reward'"),
        ({"shaping_gamma": 0.0}, "shaping_gamma is 0; it must be above 0"),
    ],
)
def test_impossible_parts_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        Estimator(**settings)


def test_mismatched_tensors_raise():
    logps, reference, mask, advantages = batch()
    with pytest.raises(ValueError, match=r"mask has shape \(8, 11\), the log-probabilities \(8, 12\)"):
        per_token_loss(logps, reference, mask[:, 1:], advantages, PRESETS["grpo"])
    with pytest.raises(ValueError, match=r"reference_logps has shape \(7, 12\)"):
        per_token_loss(logps, reference[1:], mask, advantages, PRESETS["grpo"])
    with pytest.raises(ValueError, match=r"advantages have shape \(12,\); \(8,\), one a row, or \(8, 12\)"):
        per_token_loss(logps, reference, mask, torch.zeros(12), PRESETS["grpo"])
    with pytest.raises(ValueError, match="reference_logps is None; reference 'frozen' needs"):
        per_token_loss(logps, None, mask, advantages, PRESETS["a_lol"])


@pytest.mark.parametrize(
    ("name", "reference", "advantage", "mask", "status"),
    [
        ("sft", "pi_theta", "1", "none", "paper"),
        ("reinforce", "pi_theta", "+1 or -1", "none", "paper"),
        ("grpo", "pi_old", "(R - mean of the rollouts) / std", "ratio clip", "paper"),
        ("cispo", "pi_old", "(R - mean of the rollouts) / std", "ratio held at most 5.0, detached", "paper"),
        ("gspo", "pi_theta (pi_old / pi_theta)^(1/len)", "(R - mean of the rollouts) / std", "sequence clip", "paper"),
        ("srft_offline", "1", "(R - mean of rollouts and demonstration) / std", "none", "paper"),
        ("luffy_offline", "1", "(R - mean of rollouts and demonstration) / std", "none", "paper; f from the code"),
        ("dapo", "pi_old", "(R - mean of the rollouts) / std", "ratio clip, [0.8, 1.28]", "INFERRED"),
        ("dr_grpo", "pi_old", "R - mean of the rollouts", "ratio clip", "INFERRED"),
        ("hpt_rollouts", "pi_old", "R - mean of the rollouts", "none", "code"),
        ("hpt_demonstrations", "pi_theta", "c (1)", "none", "code"),
    ],
)
def test_the_table_says_what_the_papers_table_says(name, reference, advantage, mask, status):
    (line,) = [line for line in parts_table().splitlines() if line.startswith(f"| `{name}` |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert [cell.startswith(start) for cell, start in zip(cells[1:4], (reference, advantage, mask), strict=True)] == [
        True
    ] * 3
    assert cells[4] == ("p / (p + 0.1)" if name == "luffy_offline" else "p")
    assert cells[6].startswith(status)


def test_the_page_holds_the_table_of_the_code():
    assert list(SOURCES) == list(PRESETS)
    text = PAGE.read_text()
    table = text.split("<!-- parts table -->\n")[1].split("\n<!-- end of the parts table -->")[0]
    command = "python -c 'from posttrain.objectives.policy_gradient import parts_table; print(parts_table())'"
    assert table == parts_table(), f"{PAGE.name} is behind the code: put the output of {command} between its markers"
