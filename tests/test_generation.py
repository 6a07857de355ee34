"""Jacobi generation is ordinary greedy generation in fewer forwards."""

import copy
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model

from posttrain.errors import ConfigError
from posttrain.generation import jacobi
from posttrain.models import tiny_model


@pytest.fixture(scope="module")
def prompts():
    ids = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :8] = 0
    return ids, mask


@functools.cache
def _taught(kind: str, window: int | None):
    changes = {} if window is None else {"sliding_window": window}
    torch.manual_seed(0)
    model = tiny_model(kind, **changes).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        ids = torch.randint(3, 40, (8, 3)).repeat(1, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def repetitive(kind="llama", window=None):
    """A model taught rows of repeated threes, whose guesses are right more often than not."""
    return copy.deepcopy(_taught(kind, window))


def greedy(model, ids, mask, new, **ends):
    return model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0,
        **({"eos_token_id": None} | ends),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "window"),
    [("llama", None), ("mistral", 6), ("gemma3_text", 8)],
)
@pytest.mark.parametrize("drafts", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_the_tokens_are_those_of_greedy_generation(kind, window, drafts, prompts):
    model, (ids, mask) = repetitive(kind, window), prompts
    made = jacobi.generate(model, ids, mask, max_new_tokens=40, draft_tokens=drafts, eos_token_id=[], pad_token_id=0)
    assert torch.equal(made.sequences, greedy(model, ids, mask, 40))
    assert made.new_tokens.tolist() == [40, 40, 40]
    assert made.accepted_tokens > (1.3 if drafts > 1 else 1.1), "with no guess accepted nothing is shown"
    assert made.forwards.sum() < 120


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox", "gpt2"])
def test_guesses_that_are_wrong_leave_no_trace(kind, prompts):
    torch.manual_seed(1)
    model, (ids, mask) = tiny_model(kind).eval(), prompts
    made = jacobi.generate(model, ids, mask, max_new_tokens=24, eos_token_id=[], pad_token_id=0)
    assert torch.equal(made.sequences, greedy(model, ids, mask, 24))


def test_without_guesses_each_token_takes_a_forward(prompts):
    model, (ids, mask) = repetitive(), prompts
    made = jacobi.generate(model, ids, mask, max_new_tokens=8, draft_tokens=0, eos_token_id=[], pad_token_id=0)
    assert torch.equal(made.sequences, greedy(model, ids, mask, 8))
    assert made.forwards.tolist() == [8, 8, 8] and made.accepted_tokens == 1


def test_a_row_ends_within_what_was_accepted(prompts):
    model, (ids, mask) = repetitive(), prompts
    whole = greedy(model, ids, mask, 30)[0, 12:].tolist()
    end = whole[13]
    made = jacobi.generate(model, ids, mask, max_new_tokens=30, eos_token_id=end, pad_token_id=0)
    assert torch.equal(made.sequences, greedy(model, ids, mask, 30, eos_token_id=end))
    assert made.new_tokens[0] == whole.index(end) + 1


def test_an_adapters_model_and_its_mode_are_taken_as_they_are(prompts):
    model, (ids, mask) = get_peft_model(repetitive(), LoraConfig(r=4, init_lora_weights=False)), prompts
    model.train()
    made = jacobi.generate(model, ids, mask, max_new_tokens=12, eos_token_id=[], pad_token_id=0)
    assert model.training
    assert torch.equal(made.sequences, greedy(model.eval(), ids, mask, 12))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0; it must be a whole number of 1 or more"),
        (dict(max_new_tokens=4, draft_tokens=-1), "draft_tokens is -1; it must be a whole number of 0 or more"),
        (dict(max_new_tokens=4, attention_mask=torch.ones(1, 3)), r"attention_mask is \(1, 3\); it must have the sh"),
        (dict(max_new_tokens=4, attention_mask=torch.zeros(2, 4)), "a row without a token"),
    ],
)
def test_what_cannot_be_generated_is_said(settings, message):
    with pytest.raises(ConfigError, match=message):
        jacobi.generate(tiny_model(), torch.ones(2, 4, dtype=torch.long), **settings)


def test_penalties_and_caches_that_keep_what_was_wrong_are_refused():
    from transformers import MambaConfig, MambaForCausalLM

    ids, model = torch.ones(1, 4, dtype=torch.long), tiny_model()
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(ConfigError, match="repetition_penalty 1.2, which generation by guesses does not apply"):
        jacobi.generate(model, ids, max_new_tokens=4)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(ConfigError, match="MambaForCausalLM cannot give tokens back"):
        jacobi.generate(mamba, ids, max_new_tokens=4)
