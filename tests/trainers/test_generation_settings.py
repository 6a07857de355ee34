"""What transformers' generation cannot do for rollouts is refused with the settings."""

from types import SimpleNamespace

import pytest

from posttrain.errors import ConfigError
from posttrain.trainers.policy_gradient.setting_checks import check_generation


def args(cache=None, use_vllm=False, **given):
    return SimpleNamespace(
        generation_kwargs=given or None, use_vllm=use_vllm, cache_implementation=cache, max_completion_length=8
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token_healing": True}, "sets token_healing to True; it needs the tokenizer"),
        ({"assistant_early_exit": 1}, "drafts for a single prompt"),
        ({"use_mtp": True}, "drafts for a single prompt"),
        ({"num_beam_groups": 2}, "loads its code from the hub"),
        ({"custom_generate": "org/x"}, "loads its code from the hub"),
        ({"constraints": ["a"]}, "loads its code from the hub"),
        ({"return_dict_in_generate": True}, "one sequence of tokens"),
        ({"num_return_sequences": 2}, "one sequence of tokens"),
        ({"cache_implementation": "quantized"}, "generation_kwargs sets cache_implementation to quantized"),
        ({"cache_implementation": "zzz"}, "which transformers refuses: Invalid `cache_implementation`"),
        ({"assistant_model": "x"}, "which transformers refuses: Argument `assistant_model` is not a valid"),
        ({"logits_processor": ["a"]}, "which transformers refuses"),
        ({"max_new_tokens": 0}, "which transformers refuses: `max_new_tokens` must be greater than 0"),
        ({"max_new_tokens": "x"}, "which transformers refuses"),
    ],
)
def test_generation_that_would_fail_is_refused(given, message):
    with pytest.raises(ConfigError) as error:
        check_generation(args(**given))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_needs_a_gpu(monkeypatch, name):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for held in (args(cache=name), args(cache_implementation=name)):
        with pytest.raises(ConfigError, match=f"{name}, a cache that needs a GPU"):
            check_generation(held)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_generation(args(cache=name))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"top_k": 5, "min_new_tokens": 2, "suppress_tokens": [3]},
        {"stop_strings": None, "use_mtp": False, "num_return_sequences": 1, "num_beam_groups": 1},
        {"cache_implementation": "dynamic", "no_repeat_ngram_size": 3},
    ],
)
def test_generation_that_works_is_taken(given):
    check_generation(args(**given))


def test_settings_of_vllm_are_its_own():
    check_generation(args(use_vllm=True, stop_strings=["a"], truncate_prompt_tokens=3))
