"""The head of learned tokens makes TRL's loss and gradients, where it is asked to, and gives way where it cannot."""

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from posttrain.mechanisms.noise.learned_head import LearnedHead
from posttrain.models import tiny_model

# scales and caps of the logits
ARCHITECTURES = {
    "llama": {},
    "gemma2": dict(final_logit_softcapping=3.0),
    "cohere": dict(logit_scale=0.25),
    "granite": dict(logits_scaling=3.0),
}


def batch_of(model, learned=True):
    ids = torch.randint(model.config.vocab_size, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels if learned else torch.full_like(ids, -100))


def gradients(model, batch, head=None):
    model.zero_grad()
    if head is None:
        output = model(**batch, fused_lm_head=True)
    else:
        with head.used():
            output = model(**batch, fused_lm_head=True)
    (-output.log_probs.sum()).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "nothing learned"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_metrics_and_gradients_are_those_of_the_fused_head(name, learned):
    model = tiny_model(name, **ARCHITECTURES[name]).train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    batch = batch_of(model, learned)
    theirs, wanted = gradients(model, batch)
    head = LearnedHead()
    head.give(model)
    head.settle(model)
    assert head.is_right and model.training
    ours, found = gradients(model, batch, head)
    assert torch.allclose(ours.log_probs.sum(), theirs.log_probs.sum(), rtol=1e-5)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert torch.allclose(ours.entropy, theirs.entropy, atol=1e-4)
    assert torch.equal(ours.is_top1.bool(), theirs.is_top1.bool())
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item() + 1e-7), key


def test_forwards_elsewhere_without_gradient_or_before_settling_are_the_fused_heads(monkeypatch):
    from posttrain.mechanisms.noise import learned_head

    calls = []
    known = learned_head.output_of
    monkeypatch.setattr(learned_head, "output_of", lambda *args: calls.append(1) or known(*args))
    model = tiny_model("llama").train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    batch, head = batch_of(model), LearnedHead()
    head.give(model)
    with head.used():
        model(**batch, fused_lm_head=True)
    head.is_right = True
    model(**batch, fused_lm_head=True)
    with head.used(), torch.no_grad():
        model(**batch, fused_lm_head=True)
    with head.used():
        model(**batch)
    assert not calls
    with head.used():
        model(**batch, fused_lm_head=True)
    assert calls


def test_a_model_with_more_between_states_and_logits_keeps_its_own(monkeypatch):
    model = tiny_model("llama")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    head = LearnedHead()
    head.settle(model)
    assert not head.is_right
