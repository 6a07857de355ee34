"""Jacobi generation is ordinary greedy generation in fewer forwards."""

import copy
import functools

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from posttrain.errors import ConfigError
from posttrain.generation import jacobi, support
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
    [("llama", None), pytest.param("mistral", 6, marks=pytest.mark.slow), ("gemma3_text", 8)],
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


LONG = torch.ones(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0; it must be a whole number of 1 or more"),
        (dict(draft_tokens=-1), "draft_tokens is -1; it must be a whole number of 0 or more"),
        (dict(seed="a"), "seed is 'a'; it must be a whole number of 0 or more"),
        (dict(seed=None), "seed is None; it must be a whole number"),
        (dict(pad_token_id="x"), "pad_token_id is 'x'; it must be a token's id, a whole number."),
        (dict(pad_token_id=1 << 70), "pad_token_id is 1180591620717411303424; it must be a token's id"),
        (dict(eos_token_id="x"), "eos_token_id is 'x'; it must be a token's id, a whole number or several"),
        (dict(eos_token_id=[3, 1.5]), r"eos_token_id is \[3, 1.5\]; it must be a token's id"),
        (dict(eos_token_id=torch.tensor([0.5])), "eos_token_id is .*; it must be a token's id"),
        (dict(input_ids=[[1, 2], [3]]), "input_ids is no tensor, and no list of rows that are equally long"),
        (dict(input_ids=LONG.float()), "input_ids is of torch.float32; token ids are whole numbers"),
        (dict(input_ids=LONG[0]), r"input_ids is \(4,\); it must be of two dimensions"),
        (dict(input_ids=LONG + 9999), "input_ids has the id 10000, and the model has embeddings for ids from 0 to"),
        (dict(input_ids=LONG - 3), "input_ids has the id -2, and the model has embeddings"),
        (dict(attention_mask=torch.ones(1, 3)), r"attention_mask is \(1, 3\); it must have the sh"),
        (dict(attention_mask=torch.zeros(2, 4)), "a row without a token"),
    ],
)
def test_what_cannot_be_generated_is_said(settings, message):
    with pytest.raises(ConfigError, match=message):
        jacobi.generate(tiny_model(), **dict(input_ids=LONG, max_new_tokens=4) | settings)


def test_ids_are_taken_as_lists_and_tensors_alike(prompts):
    model, (ids, mask) = repetitive(), prompts
    end = greedy(model, ids, mask, 30)[0, 25].item()
    settings = dict(max_new_tokens=30, pad_token_id=0)
    expected = jacobi.generate(model, ids, mask, eos_token_id=end, **settings)
    for several in ([end], (end, end), torch.tensor(end), torch.tensor([end])):
        made = jacobi.generate(model, ids.tolist(), mask.tolist(), eos_token_id=several, **settings)
        assert torch.equal(made.sequences, expected.sequences)
    # what padding holds is nobody's token
    assert torch.equal(
        jacobi.generate(model, ids.masked_fill(mask == 0, 9999), mask, eos_token_id=end, **settings).sequences[:, 12:],
        expected.sequences[:, 12:],
    )


def test_texts_end_where_learned_positions_do():
    model = tiny_model("gpt2", max_position_embeddings=16).eval()
    ids = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    made = jacobi.generate(model, ids, max_new_tokens=5, eos_token_id=[], pad_token_id=0)
    assert torch.equal(made.sequences, greedy(model, ids, None, 5))
    with pytest.raises(ConfigError, match="the model has 16 learned positions. Set it to 5 or less"):
        jacobi.generate(model, ids, max_new_tokens=6)


OTHER_TOKENS = dict(
    repetition_penalty=1.2, encoder_repetition_penalty=1.5, num_beams=4, num_beam_groups=2, num_return_sequences=2,
    stop_strings=["a"], sequence_bias={(3,): 1.0}, max_time=1.0, prompt_lookup_num_tokens=3, penalty_alpha=0.6,
    guidance_scale=1.5, constraints=[1], force_words_ids=[[1]], dola_layers="low", token_healing=True, min_length=5,
    min_new_tokens=5, bad_words_ids=[[3]], suppress_tokens=[3], forced_eos_token_id=3, assistant_early_exit=1,
    remove_invalid_values=True, is_assistant=True, cache_implementation="quantized", watermarking_config={"delta": 2.0},
)  # fmt: skip


def test_generation_configs_of_other_tokens_than_greedy_ones_are_refused():
    from transformers import GenerationConfig

    for name, value in OTHER_TOKENS.items():
        config = GenerationConfig()
        setattr(config, name, value)
        with pytest.raises(ConfigError, match=f"the generation config has {name} .*which generation by guesses does"):
            support.check_generation_config(config)
    model = tiny_model()
    model.generation_config.num_beams, model.generation_config.max_time = 4, 1.0
    with pytest.raises(ConfigError, match="has max_time 1.0, num_beams 4, which .*max_time = None; model.gen"):
        jacobi.generate(model, LONG, max_new_tokens=4)


def test_every_entry_of_a_generation_config_is_known_or_refused():
    from transformers import GenerationConfig

    # upstream's own defaults, and what changes no token
    defaults = GenerationConfig._get_default_generation_params()
    support.check_generation_config(GenerationConfig(**defaults))
    support.check_generation_config(None)
    known = vars(GenerationConfig()).keys()
    assert known >= support._HARMLESS and known >= support._NEUTRAL.keys()
    for name in known - support._HARMLESS:
        if not name.startswith("_"):
            config = GenerationConfig()
            setattr(config, name, 0.123)
            with pytest.raises(ConfigError, match=name):
                support.check_generation_config(config)


def test_what_changes_no_greedy_token_is_taken(prompts):
    model, (ids, mask) = repetitive(), prompts
    expected = greedy(model, ids, mask, 12)
    changes = dict(
        do_sample=True, temperature=0.3, top_k=5, top_p=0.5, max_length=3, eos_token_id=99, renormalize_logits=True,
        cache_implementation="static", use_cache=False,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(model.generation_config, name, value)
    made = jacobi.generate(model, ids, mask, max_new_tokens=12, eos_token_id=[], pad_token_id=0)
    assert torch.equal(made.sequences, expected)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PREFIX_TUNING"),
        (PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "P_TUNING"),
        (LoraConfig(task_type="CAUSAL_LM", r=4, alora_invocation_tokens=[5]), "an activated LoRA"),
    ],
    ids=["prompt", "prefix", "p-tuning", "activated"],
)
def test_adapters_that_hang_on_the_whole_text_are_refused(config, kind):
    with pytest.raises(ConfigError, match=f"the adapter is {kind}, wh"):
        jacobi.generate(get_peft_model(tiny_model(), config), LONG, max_new_tokens=4)


def test_an_adapter_without_a_model_of_its_own_is_taken(prompts):
    model, (ids, mask) = repetitive(), prompts
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
    made = jacobi.generate(model, ids, mask, max_new_tokens=8, eos_token_id=[], pad_token_id=0)
    assert torch.equal(made.sequences, greedy(model, ids, mask, 8))


def test_caches_that_keep_what_was_wrong_are_refused():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ConfigError, match="MambaForCausalLM cannot give tokens back"):
        jacobi.generate(MambaForCausalLM(config), LONG, max_new_tokens=4)
    # before there are weights
    with pytest.raises(ConfigError, match="MambaForCausalLM cannot give tokens back"):
        support.check_config(config)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="dynamic", factor=4.0),
        dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=32),
    ],
    ids=["dynamic", "longrope"],
)
def test_positions_that_hang_on_the_length_of_the_text_are_refused(rope):
    model = tiny_model(rope_parameters=rope | {"rope_theta": 10000.0})
    with pytest.raises(ConfigError, match="LlamaForCausalLM turns all positions by how long"):
        jacobi.generate(model, LONG, max_new_tokens=4)


def test_what_is_no_model_is_refused():
    for model in ("x", torch.nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match=f"model is a {type(model).__name__}; a causal language model is needed"):
            jacobi.generate(model, LONG, max_new_tokens=4)


def test_a_generate_of_the_models_own_is_refused():
    model = tiny_model()
    model.generate = lambda *args, **kwargs: None
    with pytest.raises(ConfigError, match="has a `generate` of its own"):
        jacobi.generate(model, LONG, max_new_tokens=4)
