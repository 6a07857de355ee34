"""The chunked head of several passes is the objective on whole logits, in value and in gradient."""

import pytest
import torch

from posttrain.mechanisms.noise import head
from posttrain.mechanisms.noise.head import Projection, score
from posttrain.objectives.consistency import MODES, loss, mode, terms_of

TOKENS, WIDTH, WORDS = 11, 6, 13
KINDS = {
    "plain": {},
    "bias": dict(bias=True),
    "scale": dict(scale=0.3),
    "softcap": dict(softcap=2.0),
    "all": dict(bias=True, scale=0.7, softcap=3.0),
}


def made(passes, bias=False, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    states = [leaf(TOKENS, WIDTH) for _ in range(passes)]
    return states, leaf(WORDS, WIDTH), leaf(WORDS) if bias else None, torch.randint(WORDS, (TOKENS,), generator=draw)


def on_whole_logits(states, weight, bias, targets, weights, temperature, scale=1.0, softcap=None):
    logits = [scale * torch.nn.functional.linear(one, weight, bias) for one in states]
    logits = logits if softcap is None else [softcap * torch.tanh(one / softcap) for one in logits]
    # a row of T + 1 places, of which the last predicts nothing
    logits = [torch.cat([one, torch.zeros_like(one[:1])])[None] for one in logits]
    labels = torch.cat([torch.tensor([-100]), targets])[None]
    return terms_of(logits[0], logits[1:], labels, temperature)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODES)
def test_value_and_gradients_are_those_of_whole_logits(name, kind, monkeypatch):
    # three whole chunks and a part of one
    monkeypatch.setattr(head, "CHUNK_ON_CPU", 3)
    weights, options = mode(name, 0.4, 0.2), {k: v for k, v in KINDS[kind].items() if k != "bias"}
    states, weight, bias, targets = made(1 + weights.passes, KINDS[kind].get("bias", False))
    found = score(states, Projection(weight, bias, **options), targets, weights, temperature=1.7)
    inputs = [value for value in (*states, weight, bias) if value is not None]
    ours = torch.autograd.grad(2.5 * found.loss, inputs, allow_unused=True)
    terms = on_whole_logits(states, weight, bias, targets, weights, 1.7, **options)
    expected = loss(terms, weights).sum()
    theirs = torch.autograd.grad(2.5 * expected, inputs, allow_unused=True)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-9, atol=1e-11)
    for weight_of, own, whole in zip(weights[:4], found.terms, terms, strict=True):
        if weight_of:
            assert own.sum().item() == pytest.approx(whole.item(), rel=1e-10)
    assert found.log_probs.sum().item() == pytest.approx(-terms.clean.item(), rel=1e-10)


def test_metrics_are_of_the_clean_pass_and_have_no_gradient():
    weights = mode("full", 0.5, 0.1)
    states, weight, _, targets = made(3)
    found = score(states, Projection(weight), targets, weights)
    logps = (states[0] @ weight.T).log_softmax(-1)
    torch.testing.assert_close(found.log_probs, logps.gather(-1, targets[:, None])[:, 0].detach())
    torch.testing.assert_close(found.entropy, -(logps.exp() * logps).sum(-1).detach())
    assert torch.equal(found.is_top1, logps.argmax(-1) == targets) and found.is_top1.any() and not found.is_top1.all()
    assert not any(value.requires_grad for value in (*found.terms, *found[2:])) and found.loss.requires_grad


def test_a_frozen_head_gets_no_gradient_and_none_is_made_for_it():
    weights = mode("full", 0.5, 0.1)
    states, weight, _, targets = made(3)
    frozen = score(states, Projection(weight.detach()), targets, weights)
    torch.testing.assert_close(frozen.loss, score(states, Projection(weight), targets, weights).loss)
    saved = frozen.loss.grad_fn.saved_tensors
    assert [value is None for value in saved] == [True, True, False, False, False]
    frozen.loss.backward()
    assert weight.grad is None and all(one.grad.any() for one in states)


def test_a_batch_without_learned_tokens_is_a_zero_with_a_gradient():
    states, weight, _, _ = made(3)
    empty = [one[:0] for one in states]
    found = score(empty, Projection(weight), torch.zeros(0, dtype=torch.long), mode("full", 0.5, 0.1))
    found.loss.backward()
    assert found.loss.item() == 0 and found.log_probs.shape == (0,) and not states[0].grad.any()


def test_halves_are_scored_in_single_precision():
    weights = mode("full", 0.5, 0.1)
    states, weight, _, targets = made(3, dtype=torch.bfloat16)
    found = score(states, Projection(weight), targets, weights)
    exact = score([one.double() for one in states], Projection(weight.double()), targets, weights)
    assert found.loss.dtype == torch.float32 and found.loss.item() == pytest.approx(exact.loss.item(), rel=2e-2)
    found.loss.backward()
    assert states[0].grad.dtype == weight.grad.dtype == torch.bfloat16


def test_passes_that_are_not_those_of_the_loss_are_refused():
    states, weight, _, targets = made(2)
    with pytest.raises(ValueError, match="there are 2 passes for a loss of 3"):
        score(states, Projection(weight), targets, mode("full", 0.5, 0.1))
