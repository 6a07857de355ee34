"""Regular expressions and models' configs of strangers: bounded before they are matched or built."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from posttrain import RobustDPOConfig, patterns
from posttrain.adapters.loading import load_adapter
from posttrain.config import ModelArguments, get_peft_config
from posttrain.data.processing import load_processing_class
from posttrain.errors import ConfigError
from posttrain.model_sizes import check_sizes
from posttrain.models import tiny_model
from posttrain.run import adapter_checks, checks

ENDLESS = r"(([a-z_.0-9]*)*)*X"
# Not refused for its form, and of the tenth power of a name's length.
LONG = ".*" * 10 + "X"


@pytest.mark.parametrize(
    "pattern",
    [
        ENDLESS, r"((.|\s)*)*Z", r"(.|\s)*Z", "(a|aa)*", "(a?){30}b", "(a{0,9}){0,9}", "(?:<a>.*?</a>)+", r"(\w*a)*",
        "([^A]*a)*", "((?:a*b)*c)*", "(?=(a*)*b)", "x(?(1)(a+)+|b)" .replace("x", "(x)?"), "(?>(a*)*)", "(?:(a*)*b)*+",
    ],
)  # fmt: skip
def test_a_repeat_of_what_can_be_read_in_several_ways_is_refused(pattern):
    with pytest.raises(ConfigError, match="the setting=.* can take for ever to match"):
        patterns.check(pattern, "the setting")


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj", r"model\.layers\.(1[0-9]|2[0-3])\.(self_attn|mlp)\.\w+", "(?:<a>[^<]*</a>)+", r"(\d+\.)*x",
        r"(?:[^\n]+\n)*", "(?:foo|bar)*", r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj)).*?",
        r"(?:(?!</a>)[\s\S])*+", r"(?:\s*+<a>)*", r"(?:\.\d+){0,3}", r"(\W*a)*", "",
    ],
)  # fmt: skip
def test_ordinary_patterns_are_taken(pattern):
    assert patterns.check(pattern, "the setting").pattern == pattern


def test_a_pattern_of_many_characters_is_refused():
    with pytest.raises(ConfigError, match="of 1,001 characters, and 1,000 are the most"):
        patterns.check("a" * 1001, "the setting")


def test_settings_name_no_modules_by_an_endless_pattern():
    model_args = ModelArguments(model_name_or_path="m", use_peft=True, lora_target_modules=ENDLESS)
    with pytest.raises(ConfigError, match="lora_target_modules=.* can take for ever"):
        get_peft_config(model_args)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ENDLESS},
        {"target_modules": ["a"], "rank_pattern": {ENDLESS: 2}},
        {"target_modules": ["a"], "alpha_pattern": {ENDLESS: 2}},
        {"target_modules": ["a"], "modules_to_save": [ENDLESS]},
        {"target_modules": "all-linear", "exclude_modules": ENDLESS},
        {"target_modules": ["a"], "layers_to_transform": [0], "layers_pattern": [ENDLESS]},
    ],
)
def test_no_pattern_of_an_adapter_is_endless(settings):
    with pytest.raises(ConfigError, match="can take for ever"):
        adapter_checks.check_lora(LoraConfig(**settings))


def test_a_pattern_that_takes_long_with_the_models_names_is_refused(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    model = tiny_model()
    before = torch.get_rng_state()
    for given in (model, model.config):
        with pytest.raises(ConfigError, match="takes more than 0.1 s. Name the modules in a list"):
            adapter_checks.check_names(LoraConfig(target_modules=LONG), given)
        adapter_checks.check_names(LoraConfig(target_modules=r".*\.(q|v)_proj"), given)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("pattern", [ENDLESS, LONG])
def test_an_adapter_with_such_a_pattern_is_not_put_on_its_base(tmp_path, tiny_folder, monkeypatch, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_folder), "target_modules": pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="the adapter in .*(can take for ever|takes more than 0.1 s)"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_hidden_layers", 200_000_000),
        ("vocab_size", 10**9),
        ("hidden_size", 10**4000),
        ("num_attention_heads", 10**6),
    ],
)
def test_a_model_beyond_any_models_size_is_refused_before_it_is_built(tmp_path, tiny_folder, name, value):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    args = RobustDPOConfig(str(tmp_path / "run"), use_cpu=True)
    for read in (lambda: checks.load_config(str(folder), args), lambda: load_processing_class(str(folder))):
        with pytest.raises(ConfigError, match=f"model .*: {name} is .*, and no model has more than"):
            read()


def test_sizes_are_looked_at_in_every_part_of_a_config():
    check_sizes(
        {"text_config": {"num_hidden_layers": 126, "vocab_size": 262_144}, "vocab_size_per_layer": 262_144}, "m"
    )
    for content in ({"text_config": {"num_layers": 10**6}}, {"depths": [2, 10**6]}, {"d_model": 10**9}):
        with pytest.raises(ConfigError, match="no model has more than"):
            check_sizes(content, "m")


def test_settings_replace_no_size_by_one_beyond_any_models():
    with pytest.raises(ConfigError, match="model_init_kwargs: num_hidden_layers is 200,000,000"):
        checks.check_loading({"num_hidden_layers": 200_000_000})


def test_a_model_that_is_built_for_ever_is_stopped(monkeypatch):
    monkeypatch.setattr(checks, "BUILD_SECONDS", 0.05)
    with pytest.raises(ConfigError, match="the model cannot be built within 0.05 s"), checks.building("the model"):
        while True:
            pass
