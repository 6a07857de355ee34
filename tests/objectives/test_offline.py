"""Golden numbers are computed apart from the code, from the formulas in `offline.a_lol`; float64."""

import math

import pytest
import torch

from posttrain.objectives import policy_gradient
from posttrain.objectives.estimators import PRESETS
from posttrain.objectives.offline import (
    NEEDS_REFERENCE,
    VARIANTS,
    a_lol,
    check_settings,
    clamp_ratio,
    gradient_weights,
    weight_of,
)

PAD = float("nan")
LOGPS = torch.tensor([[-1.0, -0.5, -2.0], [-0.3, -0.7, PAD]], dtype=torch.float64)
REF = torch.tensor([[-1.2, -0.9, -1.5], [-0.6, -0.4, PAD]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
R = torch.tensor([0.9, 0.7], dtype=torch.float64)
A = torch.tensor([0.3, 0.15], dtype=torch.float64)
# R = [.9, .4] against V = [.6, .55]
SIGNED = torch.tensor([0.3, -0.15], dtype=torch.float64)


def weighed(variant, advantages=A, rewards=R):
    return {name: {"rewards": rewards, "advantages": advantages}[name] for name in [weight_of(variant)] if name}


def mean_and_gradient(variant, reference=REF, logps=LOGPS, mask=MASK, **kwargs):
    logps = logps.clone().requires_grad_()
    reference = reference if variant in NEEDS_REFERENCE or variant == "a_lol_kl" else None
    loss = a_lol(logps, reference, mask, variant=variant, **(weighed(variant) | kwargs)).mean()
    loss.backward()
    return loss.item(), logps.grad


# d loss / d logp of the mean over the two answers: -weight / 2 at each token
GOLDEN = [
    ("nll", {}, 2.25, [[-0.5] * 3, [-0.5] * 2]),
    ("wbc", {}, 1.925, [[-0.45] * 3, [-0.35] * 2]),
    ("r_lol", dict(clip=0.9), 2.09064420, [[-0.49732691] * 3, [-0.35] * 2]),
    ("a_lol_ref_free", {}, 0.6, [[-0.15] * 3, [-0.075] * 2]),
    ("a_lol", dict(clip=0.9), 0.65521473, [[-0.16577564] * 3, [-0.075] * 2]),
    ("a_lol", dict(clip=0.2), 0.65521473, [[-0.16577564] * 3, [-0.075] * 2]),
    ("a_lol_seq", dict(clip=0.9), 0.54632124, [[-0.18321041, -0.22377370, -0.09097960], [-0.10123941, -0.05556137]]),
    ("a_lol_seq", dict(clip=0.2), 0.579, [[-0.18, -0.18, -0.12], [-0.09, -0.06]]),
    ("a_lol_kl", dict(kl_beta=0.05), 0.6025, [[-0.125] * 3, [-0.05] * 2]),
    # max(p, .1) p-weighted: .9/2 (e^-1, e^-.5, e^-2) and .7/2 (e^-.3, e^-.7), all above the floor
    ("r_gold", {}, 0.62326621, [[-0.16554575, -0.27293880, -0.06090088], [-0.25928638, -0.17380486]]),
]


@pytest.mark.parametrize(("variant", "settings", "loss", "gradient"), GOLDEN)
def test_golden_losses_and_gradients(variant, settings, loss, gradient):
    value, slope = mean_and_gradient(variant, **settings)
    assert value == pytest.approx(loss, abs=1e-8)
    for row, expected in zip(slope, gradient, strict=True):
        assert row[: len(expected)].tolist() == pytest.approx(expected, abs=1e-8)
    assert slope[1, 2] == 0, "padding has no gradient, whatever stands there"


@pytest.mark.parametrize(
    ("variant", "settings", "loss"),
    [
        ("a_lol", {}, 0.58021473),
        ("a_lol_ref_free", {}, 0.525),
        ("a_lol_kl", dict(kl_beta=0.05), 0.5275),
        ("a_lol_seq", {}, 0.47705646),
    ],
)
def test_a_negative_advantage_counts_zero(variant, settings, loss):
    value, slope = mean_and_gradient(variant, advantages=SIGNED, **settings)
    assert value == pytest.approx(loss, abs=1e-8)
    # the KL part pushes an answer down that does not beat the value by beta
    expected = [0.025, 0.025] if variant == "a_lol_kl" else [0.0, 0.0]
    assert slope[1, :2].tolist() == pytest.approx(expected, abs=1e-12)


def test_kept_negative_advantages_push_down():
    value, slope = mean_and_gradient("a_lol_ref_free", advantages=SIGNED, keep_negative=True)
    # (.3 x 3.5 - .15 x 1.0) / 2
    assert value == pytest.approx(0.45, abs=1e-12)
    assert slope[1, :2].tolist() == pytest.approx([0.075, 0.075], abs=1e-12)


def test_r_gold_holds_improbable_tokens_up():
    logps = torch.tensor([[-5.0, -1.0]], dtype=torch.float64, requires_grad=True)
    loss = a_lol(logps, None, torch.ones(1, 2), variant="r_gold", rewards=torch.ones(1))
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.1 * 5 + math.exp(-1), abs=1e-12)
    assert logps.grad.flatten().tolist() == pytest.approx([-0.1, -math.exp(-1)], abs=1e-12)


def test_at_the_reference_the_ratio_is_one():
    free = a_lol(LOGPS, None, MASK, A, "a_lol_ref_free")
    for variant in ("a_lol", "a_lol_seq"):
        assert torch.equal(a_lol(LOGPS, LOGPS, MASK, A, variant), free)
    assert torch.equal(
        a_lol(LOGPS, LOGPS, MASK, variant="r_lol", rewards=R), a_lol(LOGPS, None, MASK, rewards=R, variant="wbc")
    )


def test_unit_advantages_are_the_summed_nll_and_a_zero_value_is_the_rewards_form():
    ones = torch.ones(2, dtype=torch.float64)
    assert torch.equal(a_lol(LOGPS, None, MASK, ones, "a_lol_ref_free"), a_lol(LOGPS, None, MASK, variant="nll"))
    assert torch.equal(a_lol(LOGPS, REF, MASK, R, "a_lol"), a_lol(LOGPS, REF, MASK, variant="r_lol", rewards=R))
    assert torch.equal(
        a_lol(LOGPS, None, MASK, R, "a_lol_ref_free"), a_lol(LOGPS, None, MASK, variant="wbc", rewards=R)
    )


def test_kl_without_beta_is_ref_free_and_its_reference_is_a_constant():
    free = a_lol(LOGPS, None, MASK, A, "a_lol_ref_free")
    assert torch.equal(a_lol(LOGPS, REF, MASK, A, "a_lol_kl"), free)
    value, slope = mean_and_gradient("a_lol_kl", kl_beta=0.05)
    without, same = mean_and_gradient("a_lol_kl", reference=None, kl_beta=0.05)
    assert torch.equal(slope, same)
    # beta x the mean of the reference's sums, -3.6 and -1.0
    assert value - without == pytest.approx(0.05 * 2.3, abs=1e-12)


@pytest.mark.parametrize("clip", [None, math.inf, 1e6])
def test_without_a_clip_the_ratio_is_exact(clip):
    far = REF - 2
    loss = a_lol(LOGPS, far, MASK, A, clip=clip)
    ratio = torch.tensor([math.exp(0.1 + 6), math.exp(4)], dtype=torch.float64)
    torch.testing.assert_close(loss, A * ratio * torch.tensor([3.5, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("variant", ["r_lol", "a_lol", "a_lol_seq"])
def test_an_answer_of_weight_zero_counts_nothing_however_far_it_drifted(variant):
    # exp(1000) overflows; the second answer's loss stays what it is alone
    far = REF - torch.tensor([[1000.0], [0.1]], dtype=torch.float64)
    weights = torch.tensor([0.0, 0.15], dtype=torch.float64)
    logps = LOGPS.clone().requires_grad_()
    loss = a_lol(logps, far, MASK, variant=variant, clip=None, **weighed(variant, weights, weights))
    loss.sum().backward()
    alone = a_lol(LOGPS[1:], far[1:], MASK[1:], variant=variant, clip=None, **weighed(variant, A[1:], A[1:]))
    assert loss.tolist() == [0.0, alone.item()] and alone.item() > 0
    assert logps.grad[0].tolist() == [0.0, 0.0, 0.0] and (logps.grad[1, :2] < 0).all()


def test_a_clipped_ratio_keeps_its_gradient():
    _, slope = mean_and_gradient("a_lol", reference=REF - 2, clip=0.9)
    assert slope[0].tolist() == pytest.approx([-0.3 * 1.9 / 2] * 3, abs=1e-12)
    _, slope = mean_and_gradient("a_lol", reference=REF + 2, clip=0.9)
    assert slope[0].tolist() == pytest.approx([-0.3 * 0.1 / 2] * 3, abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_order_and_dtype_change_nothing(variant):
    kwargs = dict(kl_beta=0.05) if variant == "a_lol_kl" else {}
    plain = a_lol(LOGPS, REF, MASK, variant=variant, **weighed(variant), **kwargs)
    wide = torch.nn.functional.pad(LOGPS, (2, 3), value=math.inf), torch.nn.functional.pad(REF, (2, 3), value=PAD)
    padded = a_lol(*wide, torch.nn.functional.pad(MASK, (2, 3)), variant=variant, **weighed(variant), **kwargs)
    torch.testing.assert_close(padded, plain, rtol=1e-14, atol=0)
    turned = {name: value.flip(0) for name, value in weighed(variant).items()}
    assert torch.equal(
        a_lol(LOGPS.flip(0), REF.flip(0), MASK.flip(0), variant=variant, **turned, **kwargs), plain.flip(0)
    )
    half = a_lol(LOGPS.bfloat16(), REF.bfloat16(), MASK, variant=variant, **weighed(variant), **kwargs)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), plain, rtol=0.05, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_detached_weights(variant):
    """By finite differences of the log-likelihood alone, the weight read off at the point."""
    kwargs = dict(kl_beta=0.05) if variant == "a_lol_kl" else {}
    _, slope = mean_and_gradient(variant, **kwargs)
    log_ratio = torch.where(MASK.bool(), LOGPS - REF, 0.0)
    ratio = {
        "r_lol": log_ratio.sum(1, keepdim=True).exp(),
        "a_lol": log_ratio.sum(1, keepdim=True).exp(),
        "a_lol_seq": log_ratio.exp(),
        "r_gold": LOGPS.exp().clamp(min=0.1),
    }.get(variant, torch.ones(2, 1, dtype=torch.float64))
    weights = weighed(variant).get(weight_of(variant), R)
    factor = gradient_weights(variant, weights, kwargs.get("kl_beta", 0.0))
    expected = torch.where(MASK.bool(), -factor[:, None] * ratio / 2, 0.0)
    torch.testing.assert_close(slope, expected)


def test_gradcheck():
    logps = torch.where(MASK.bool(), LOGPS, 0.0).requires_grad_()
    # the ratio is detached, so the derivative is checked where it is 1 throughout
    assert torch.autograd.gradcheck(lambda x: a_lol(x, None, MASK, A, "a_lol_ref_free"), logps)
    assert torch.autograd.gradcheck(lambda x: a_lol(x, REF, MASK, A, "a_lol_kl", kl_beta=0.2), logps)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name in PRESETS])
def test_the_losses_are_those_of_the_unified_estimator(variant):
    beta = 0.05 if variant == "a_lol_kl" else 0.0
    value, slope = mean_and_gradient(variant, kl_beta=beta)
    weights = {"rewards": R, "advantages": A.clamp(min=0) - beta}[weight_of(variant)]
    logps = LOGPS.clone().requires_grad_()
    parts = PRESETS[variant]
    per_token = policy_gradient.per_token_loss(logps, REF, MASK, weights, parts)
    loss = policy_gradient.aggregate(per_token, MASK, parts)
    loss.backward()
    torch.testing.assert_close(logps.grad, slope)
    # the estimator leaves the KL's constant out
    assert loss.item() == pytest.approx(value - beta * 2.3, abs=1e-12)


def test_which_answers_have_no_gradient():
    values = torch.tensor([-1.0, 0.0, 0.05, 1.0])
    dead = {name: (gradient_weights(name, values, 0.05 * (name == "a_lol_kl")) == 0).tolist() for name in VARIANTS}
    assert dead["nll"] == [False] * 4
    assert dead["wbc"] == dead["r_gold"] == dead["r_lol"] == [False, True, False, False]
    assert dead["a_lol"] == dead["a_lol_seq"] == dead["a_lol_ref_free"] == [True, True, False, False]
    assert dead["a_lol_kl"] == [False, False, True, False]
    assert gradient_weights("a_lol", values, keep_negative=True).tolist() == values.tolist()


def test_a_clip_above_one_leaves_ratios_at_zero():
    assert clamp_ratio(torch.tensor([0.0, 3.0]), 1.5).tolist() == [0.0, 2.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(variant="ppo"), "variant is 'ppo'; it must be one of nll, wbc, r_gold, r_lol, a_lol, a_lol_seq,"),
        (
            dict(rewards=R),
            "advantages and rewards are both given; variant 'a_lol' weighs by advantages. Leave the other",
        ),
        (dict(variant="nll", rewards=R), "advantages and rewards are both given; variant 'nll' weighs by neither."),
        (dict(advantages=None), "advantages is None; variant 'a_lol' weighs by advantages, a tensor of (2,)."),
        (dict(variant="wbc"), "rewards is None; variant 'wbc' weighs by rewards, a tensor of (2,)."),
        (dict(advantages=None, rewards=R), "advantages is None; variant 'a_lol' weighs by advantages"),
        (dict(ref_per_token_logps=None), "ref_per_token_logps is None; variant 'a_lol' needs a tensor of (2, 3)."),
        (dict(advantages=A[:, None]), "advantages has shape (2, 1); one number an answer, (2,), is needed."),
        (dict(mask=MASK[:, :2]), "mask has shape (2, 2), per_token_logps (2, 3)."),
        (dict(ref_per_token_logps=REF[:1]), "ref_per_token_logps has shape (1, 3), per_token_logps (2, 3)."),
        (dict(per_token_logps=LOGPS[0]), "per_token_logps has shape (3,); (answers, tokens) is needed."),
        (dict(clip=0.0), "clip is 0.0; it must be above 0 (0.9 keeps ratios in [0.1, 1.9])"),
        (dict(clip=float("nan")), "clip is nan; it must be above 0"),
        (dict(clip="0.9"), "clip is '0.9'; it must be above 0"),
        (dict(clip=True), "clip is True; it must be above 0"),
        (dict(kl_beta="0.1"), "kl_beta is '0.1'; it must be a number of 0 or more."),
        (dict(advantages=[0.3, 0.15]), "advantages is of type list; a tensor of shape (2,) is needed."),
        (dict(mask=[[1, 1, 1], [1, 1, 0]]), "mask is of type list; a tensor of shape (2, 3) is needed."),
        (dict(per_token_logps=[[-1.0]]), "per_token_logps is of type list; a tensor of shape (answers, tokens)"),
        (dict(kl_beta=-0.1), "kl_beta is -0.1; it must be a number of 0 or more."),
        (dict(kl_beta=0.1), "kl_beta is 0.1 with variant a_lol, which has no KL part: a_lol_kl has one"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    arguments = dict(per_token_logps=LOGPS, ref_per_token_logps=REF, mask=MASK, advantages=A) | change
    with pytest.raises(ValueError) as error:
        a_lol(**arguments)
    assert message in str(error.value)


def test_a_clip_that_is_not_read_is_not_checked():
    check_settings("a_lol_kl", 0.0, 0.1)
    assert torch.equal(
        a_lol(LOGPS, REF, MASK, A, "a_lol_ref_free", clip=0), a_lol(LOGPS, None, MASK, A, "a_lol_ref_free")
    )
