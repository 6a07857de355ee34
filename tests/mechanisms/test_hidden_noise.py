"""Noise on hidden states: golden scales, sequences that know nothing of each other."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from posttrain.errors import ConfigError
from posttrain.mechanisms.noise import draws, hidden
from posttrain.mechanisms.noise.passes import NoisyPasses, separate, settle
from posttrain.models import tiny_model
from posttrain.objectives.consistency import mode
from tests.runs import distance

STATES = torch.tensor([[1, -2, 0.5, 4], [0.1, 0.2, -0.3, 0.05]])
GOLDEN = [
    [0.2262093998, 0.1516328166, 0.25, 0.1241464998],
    [0.0045947784, 0.0037619014, 0.0025216981, 0.0050780053],
]
TOGETHER = draws.sequences(torch.ones(1, 2, dtype=torch.long))


def test_scales_and_the_ratio_are_the_golden_numbers():
    torch.testing.assert_close(hidden.scales(STATES, TOGETHER, 0.1), torch.tensor(GOLDEN), rtol=1e-5, atol=1e-8)
    # version 1: the standard deviation of the states in the base as well
    by_std = hidden.scales(STATES, TOGETHER, 0.1, by_std=True)
    torch.testing.assert_close(by_std, 1.6825655368 * torch.tensor(GOLDEN), rtol=1e-5, atol=1e-8)
    found = hidden.ratio(hidden.signal_and_noise(STATES, TOGETHER, 0.1, by_std=True))
    assert found == pytest.approx(7.9051845797, rel=1e-5)


def test_a_sequences_scales_hang_on_no_neighbour_and_on_no_padding():
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(length, 8, generator=draw) * scale for length, scale in ((3, 1.0), (5, 40.0))]
    alone = [hidden.scales(row, draws.sequences(torch.ones(1, len(row), dtype=torch.long)), 0.1, True) for row in rows]
    flat = draws.sequences(torch.ones(1, 8, dtype=torch.long), None, torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    packed = hidden.scales(torch.cat(rows), flat, 0.1, True)
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = torch.cat([rows[0], torch.full((2, 8), 1e3), rows[1]])
    found = hidden.scales(padded, draws.sequences(torch.ones_like(mask), mask), 0.1, True)
    torch.testing.assert_close(found[mask.flatten().bool()], torch.cat(alone), rtol=1e-5, atol=1e-6)
    # a mean over the whole batch is a known fault
    assert not torch.allclose(
        hidden.scales(torch.cat(rows), draws.sequences(torch.ones(1, 8).long()), 0.1)[:3], alone[0]
    )


def test_a_constant_state_has_almost_no_noise_and_no_division_by_zero():
    found = hidden.scales(torch.full((2, 8), 3.0), TOGETHER, 0.1)
    assert found.isfinite().all() and 0 < found.max() < 1e-5
    assert hidden.scales(torch.zeros(2, 8), TOGETHER, 0.1).max() == 0


MODELS = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": dict(
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "mistral": dict(sliding_window=5),
    "gpt_neox": {},
    "mixtral": dict(num_local_experts=4),
}
FULL = mode("full", 0.1, 1.0)


def patched(kind="llama", attention="sdpa", layers=(1, 3), weights=FULL, base=4.0, temperature=2.0):
    model = tiny_model(kind, num_hidden_layers=4, **MODELS[kind])
    model.set_attn_implementation(attention)
    # a fresh model's predictions hardly differ from each other
    model.get_output_embeddings().weight.data.mul_(10)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    passes = NoisyPasses(list(layers), base, weights, temperature, seed=3)
    passes.give(model)
    return model.train(), passes


def padded(rows=3, width=10):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 250, (rows, width), generator=draw)
    mask = torch.ones_like(ids)
    mask[-1, width // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def flat():
    lengths = (5, 9, 3, 7)
    ids = torch.randint(1, 250, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    numbers = (positions == 0).cumsum(dim=1).int() - 1
    return dict(
        input_ids=ids, position_ids=positions, seq_idx=numbers, labels=ids.masked_fill(positions == 0, -100)
    )  # fmt: skip


def one_forward(model, passes, batch, step=7):
    model.zero_grad()
    with passes.added_to(step):
        outputs = model(**batch, use_cache=False, fused_lm_head=True)
    loss = -outputs.log_probs.sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_turn(model, passes, batch, step=7):
    model.zero_grad()
    loss = separate(passes, model, batch, step)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.core("padded-llama-sdpa", "padded-gemma3_text-sdpa", "flat-qwen3-eager", "square-mixtral-sdpa")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["padded", "flat", "square", "single"])
def test_one_forward_is_three(kind, attention, layout):
    batch = dict(padded=padded, flat=flat, square=lambda: padded(8, 8), single=lambda: padded(1, 10))[layout]()
    model, passes = patched(kind, attention)
    settle(passes, model)
    assert not passes.from_start
    loss, ours = one_forward(model, passes, batch)
    expected, theirs = in_turn(model, passes, batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert distance(ours, theirs) < 1e-5 and ours.keys() == theirs.keys()
    # what parts the passes counts for something
    parted = passes.scored.terms.divergence.sum().item(), passes.scored.terms.consistency.sum().item()
    assert 0.9 * parted[0] + parted[1] > 0.1 * loss
    passes.from_start = True
    again, start = one_forward(model, passes, batch)
    assert again == pytest.approx(expected, rel=1e-5) and distance(start, theirs) < 1e-5


def test_layers_below_the_noise_see_each_row_once():
    model, passes = patched(layers=(1, 3))
    seen = {}

    def see(number, module, args):
        seen[number] = len(args[0])

    for number, layer in enumerate(hidden.decoder_layers(model)):
        layer.register_forward_pre_hook(functools.partial(see, number))
    one_forward(model, passes, padded())
    assert seen == {0: 3, 1: 3, 2: 9, 3: 9}


def test_rows_with_something_unknown_are_repeated_from_the_start():
    model, passes = patched()
    expected, theirs = in_turn(model, passes, padded())
    layer = hidden.decoder_layers(model)[2]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"unheard_of": torch.ones(3)}), with_kwargs=True, prepend=True
    )
    loss, ours = one_forward(model, passes, padded())
    assert passes.from_start and loss == pytest.approx(expected, rel=1e-5) and distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_have_the_noise_that_they_had(reentrant):
    model, passes = patched()
    loss, whole = one_forward(model, passes, padded())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, recomputed = one_forward(model, passes, padded())
    assert again == loss and distance(recomputed, whole) < 1e-6


@pytest.mark.parametrize("name", ["ce_noisy", "ce_kl", "kl_only", "consistency_only"])
def test_each_mode_is_the_objective(name):
    model, passes = patched(weights=mode(name, 0.3, 0.2))
    settle(passes, model)
    loss, ours = one_forward(model, passes, padded())
    expected, theirs = in_turn(model, passes, padded())
    assert loss == pytest.approx(expected, rel=1e-5) and distance(ours, theirs) < 1e-5


def test_without_scale_the_loss_is_a_share_of_cross_entropy():
    model, passes = patched(base=0.0)
    loss, _ = one_forward(model, passes, padded())
    plain = model(**padded(), fused_lm_head=True)
    assert loss == pytest.approx(-0.1 * plain.log_probs.sum().item(), rel=1e-6)
    assert passes.scored.terms.divergence.abs().max() < 1e-6


def test_other_forwards_are_as_they_were():
    model, passes = patched()
    batch = padded()
    with torch.no_grad(), passes.added_to(0):
        assert model(**batch, fused_lm_head=True).log_probs.shape == (3, 9)
        assert torch.equal(model(**batch, fused_lm_head=True).log_probs, model(**batch, fused_lm_head=True).log_probs)
    assert passes.squares is None
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**batch).logits, model(**batch).logits)
    one_forward(model, passes, batch)
    ratio = passes.take_squares()
    assert ratio.shape == (2, 2) and (ratio > 0).all() and passes.take_squares() is None


def test_what_cannot_be_forwarded_so_is_refused():
    class Odd(nn.Module):
        config = SimpleNamespace()

        def __init__(self):
            super().__init__()
            self.base_model = nn.Sequential(nn.Linear(2, 2))

    with pytest.raises(ConfigError, match="Odd has no list of decoder layers"):
        hidden.decoder_layers(Odd())
    model, passes = patched()
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ConfigError, match="makes other numbers of several rows in one forward than of each alone"):
        settle(passes, model)
