"""A frozen A: orthonormal, the same for a seed, and the model is left as it was."""

import torch
from peft import LoraConfig, get_peft_model

from posttrain.mechanisms.frozen_a import freeze_a
from posttrain.models import tiny_model


def adapted(seed=0, init=True, r=4):
    torch.manual_seed(seed)
    return get_peft_model(tiny_model(), LoraConfig(r=r, target_modules="all-linear", init_lora_weights=init))


def matrices(model, kind):
    return {name: p for name, p in model.named_parameters() if kind in name}


def test_a_is_orthonormal_frozen_and_the_same_for_a_seed():
    first, second, other = adapted(0), adapted(1), adapted(0)
    ids = torch.arange(10, 26).view(2, 8)
    before = first(input_ids=ids).logits
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        freeze_a(model, seed)
    for (name, a), b in zip(matrices(first, "lora_A").items(), matrices(second, "lora_A").values(), strict=True):
        torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-6, rtol=0)
        assert torch.equal(a, b) and not torch.equal(a, matrices(other, "lora_A")[name]) and not a.requires_grad
    assert all(p.requires_grad for p in matrices(first, "lora_B").values())
    torch.testing.assert_close(first(input_ids=ids).logits, before, atol=0, rtol=0)


def test_an_adapter_that_was_trained_keeps_its_a():
    model = adapted(init=False)
    kept = {name: p.clone() for name, p in matrices(model, "lora_A").items()}
    freeze_a(model, 0)
    assert all(torch.equal(p, kept[name]) and not p.requires_grad for name, p in matrices(model, "lora_A").items())


def test_a_rank_above_the_width_has_orthonormal_columns():
    model = adapted(r=100)
    freeze_a(model, 0)
    for a in matrices(model, "lora_A").values():
        small = a.T @ a if a.size(0) > a.size(1) else a @ a.T
        torch.testing.assert_close(small, torch.eye(min(a.shape)), atol=1e-5, rtol=0)
