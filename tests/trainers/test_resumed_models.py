"""A run goes on only with the adapter and the base that its checkpoint was trained with."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

from posttrain import NoisySFTConfig, RobustDPOConfig, RobustDPOTrainer
from posttrain.config.setting import before_declared
from posttrain.errors import ConfigError
from posttrain.models import byte_tokenizer, tiny_model
from posttrain.run.checkpoint_files import MARKER
from posttrain.run.identity import differing, plain
from tests.conftest import make_pairs
from tests.training import settings


def build(model, out, peft, **overrides):
    return RobustDPOTrainer(
        str(model),
        args=RobustDPOConfig(**settings(out, pair_loss="dpo", save_strategy="steps", save_steps=1) | overrides),
        train_dataset=make_pairs(16),
        peft_config=peft,
        processing_class=byte_tokenizer("<|pad|>"),
    )


def qv(**changes):
    return LoraConfig(**dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "base"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted")
    build(base, out, qv(), max_steps=1).train()
    return out / "checkpoint-1"


@pytest.mark.core("changes0", "changes5")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(target_modules=["k_proj", "v_proj"]), "target_modules: q_proj, v_proj .* there, k_proj, v_proj"),
        (dict(target_modules=["o_proj", "gate_proj"]), "target_modules"),
        (dict(layers_to_transform=[0]), "target_modules"),
        (dict(alpha_pattern={"q_proj": 64}), "alpha_pattern: {} there, {'q_proj': 64} here"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    ],
)
def test_another_adapter_does_not_go_on(base, checkpoint, tmp_path, changes, named):
    trainer = build(base, tmp_path, qv(**changes))
    with pytest.raises(ConfigError, match=named):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.core("spelled0")
@pytest.mark.parametrize("spelled", [["v_proj", "q_proj"], r".*\.(q|v)_proj"])
def test_the_same_modules_in_other_words_go_on(base, checkpoint, tmp_path, spelled):
    trainer = build(base, tmp_path, qv(target_modules=spelled))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2


@pytest.mark.slow
def test_a_marker_that_does_not_tell_the_modules_is_held_against_the_tensors(base, tmp_path):
    build(base, tmp_path / "then", qv(), max_steps=1).train()
    checkpoint = tmp_path / "then" / "checkpoint-1"
    content = json.loads((checkpoint / MARKER).read_text())
    del content["update"]["target_modules"], content["identity"]["base"], content["identity"]["base_weights"]
    (checkpoint / MARKER).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="is not the one of this run: .* tensors differ"):
        build(base, tmp_path / "now", qv(target_modules=["q_proj", "o_proj"])).train(
            resume_from_checkpoint=str(checkpoint)
        )
    same = build(base, tmp_path / "same", qv())
    same.train(resume_from_checkpoint=str(checkpoint))
    assert same.state.global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "peft",
    [
        lambda: IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
        lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: qv(init_lora_weights="pissa"),
        lambda: qv(modules_to_save=["lm_head"]),
        lambda: None,
    ],
)  # fmt: skip
def test_the_same_settings_go_on_with_any_kind_of_adapter(base, tmp_path, peft):
    build(base, tmp_path, peft(), max_steps=1).train()
    trainer = build(base, tmp_path, peft())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


@pytest.mark.slow
def test_another_base_of_the_same_name_is_refused_and_a_moved_one_taken(base, checkpoint, tmp_path):
    other, moved, longer = (tmp_path / name / "base" for name in ("other", "moved", "longer"))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(moved)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.01
    model.save_pretrained(other)
    tiny_model("llama", num_hidden_layers=3).save_pretrained(longer)
    with pytest.raises(ConfigError, match="base_weights: other weights under the adapter there than here"):
        build(other, tmp_path / "a", qv()).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ConfigError, match="base: a model of another shape there than here"):
        build(longer, tmp_path / "b", qv()).train(resume_from_checkpoint=str(checkpoint))
    trainer = build(moved, tmp_path / "c", qv())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2


def test_a_checkpoint_of_a_version_without_a_setting_goes_on_with_its_default_alone(base, checkpoint, tmp_path):
    old = tmp_path / "run/checkpoint-1"
    shutil.copytree(checkpoint, old)
    content = json.loads((old / MARKER).read_text())
    del content["identity"]["reduction"]
    (old / MARKER).write_text(json.dumps(content))
    build(base, tmp_path / "same", qv(), max_steps=1).train(resume_from_checkpoint=str(old))
    for out, overrides in (("other", {}), ("run", {}), ("run", {"overwrite": True})):
        with pytest.raises(ConfigError, match="reduction: mean there, dr_dpo here"):
            trainer = build(base, tmp_path / out, qv(), max_steps=1, reduction="dr_dpo", **overrides)
            trainer.train(resume_from_checkpoint=str(old))


@pytest.mark.slow
def test_a_whole_model_of_another_depth_does_not_go_on(base, tmp_path):
    build(base, tmp_path / "run", None, max_steps=1).train()
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="base: a model of another shape there than here"):
        build(tmp_path / "base", tmp_path / "new", None).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
        )


def test_identities_are_compared_as_json_holds_them_and_as_far_as_both_tell():
    assert plain({"a": {"y", "x"}, "b": frozenset()}) == {"a": ["x", "y"], "b": []}
    assert differing({"a": (1, 2), "new": 1}, {"a": [1, 2], "old": 2}) == ""
    assert before_declared(NoisySFTConfig)["noise"] is None
    assert differing({"a": 1, "method": "m"}, {"method": "m"}, {"a": 0, "b": 1}) == "a: 0 there, 1 here"
    assert differing({"a": 1, "method": "m"}, {"method": "n"}, {"a": 0}) == "method: n there, m here"
    assert differing({"a": (1, 2)}, {"a": [2, 1]}) == "a: [2, 1] there, [1, 2] here"
