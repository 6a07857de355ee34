"""Dropout in preference training: where it falls, and where it does not."""

import json
import re

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM
from trl import DPOConfig, DPOTrainer, ModelConfig

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.config import ModelArguments, parse
from posttrain.errors import ConfigError
from posttrain.mechanisms.dropout import check_functional_dropout
from posttrain.models import tiny_model
from tests.conftest import make_pairs
from tests.training import distance, lora, losses, settings, trainable


def adapter(dropout, **fields):
    return LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, **fields)


def build(model, output_dir, peft_config, trainer_class=RobustDPOTrainer, config_class=RobustDPOConfig, **over):
    if config_class is RobustDPOConfig:
        over = dict(pair_loss="dpo") | over
    processing = {"processing_class": over.pop("tokenizer", None)}
    return trainer_class(
        model, args=config_class(**settings(output_dir, **over)), train_dataset=make_pairs(16), peft_config=peft_config,
        **processing,
    )  # fmt: skip


def run(trainer, **train):
    before = trainable(trainer.model)
    trainer.train(**train)
    after = trainable(trainer.model)
    return {name: after[name] - before[name] for name in before}


@pytest.mark.slow
def test_lora_dropout_is_used(tiny_folder, tmp_path):
    plain = run(build(tiny_folder, tmp_path / "0", adapter(0.0)))
    for rate in (0.05, 0.5):
        trainer = build(tiny_folder, tmp_path / str(rate), adapter(rate))
        rates = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout) and module.p}
        assert rates == {rate}
        assert distance(run(trainer), plain) > 1e-3
        assert losses(trainer)[0] == pytest.approx(0.6931472, abs=1e-5), "a new adapter is the identity all the same"


@pytest.mark.slow
def test_without_lora_dropout_nothing_drops_out_and_the_run_is_the_parents(tiny_folder, tmp_path):
    plain = dict(use_cpu=True, bf16=False, gradient_checkpointing=False)
    for number, config in enumerate((adapter(0.0), LoraConfig(r=4, target_modules="all-linear"))):
        theirs = run(build(tiny_folder, tmp_path / f"{number}t", config, DPOTrainer, DPOConfig, **plain))
        ours = run(build(tiny_folder, tmp_path / f"{number}o", config, prefix_sharing="never"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_recipes_adapter_drops_nothing_out_unless_asked():
    assert ModelConfig().lora_dropout > 0 == ModelArguments().lora_dropout
    assert parse((ModelArguments,), ["--lora_dropout", "0.1"])[0].lora_dropout == 0.1


@pytest.mark.core("given")
@pytest.mark.parametrize("start", ["new", "given"])
def test_reference_and_evaluation_are_clean_of_it(tiny_folder, tmp_path, tokenizer, start):
    config = adapter(0.5)
    model = tiny_folder
    if start == "given":
        model, config = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config), None
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    trainer = build(model, tmp_path, config, tokenizer=tokenizer)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    with torch.no_grad():
        first, second = (trainer.compute_ref_log_probs(trainer.model, dict(batch))[0] for _ in range(2))
        assert torch.equal(first, second)
        trainer.model.eval()
        policy = trainer.score(trainer.model, dict(batch)).chosen_logps
    torch.testing.assert_close(policy, first, atol=1e-3, rtol=0)
    # and the check of the zero margin, which is of the weights
    run(trainer)


@pytest.mark.slow
def test_a_bases_own_dropout_is_off_by_default_and_clean_references_where_it_is_on(tmp_path, tokenizer):
    def gpt2():
        return tiny_model("gpt2", attn_pdrop=0.0, n_embd=64, n_layer=2, n_head=4, n_positions=512)

    trainer = build(gpt2(), tmp_path / "off", LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
                    tokenizer=tokenizer)  # fmt: skip
    assert not any(module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout))
    trainer = build(gpt2(), tmp_path / "on", LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
                    tokenizer=tokenizer, disable_dropout=False)  # fmt: skip
    batch = dict(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    with torch.no_grad():
        first, second = (trainer.compute_ref_log_probs(trainer.model, dict(batch))[0] for _ in range(2))
        noisy = trainer.score(trainer.model, dict(batch)).chosen_logps
    assert torch.equal(first, second) and not torch.equal(first, noisy)
    run(trainer)


@pytest.mark.slow
def test_dr_dpo_weighs_the_losses_that_are_trained_on(tiny_folder, tmp_path):
    # dropout is drawn alike in the scoring and the training pass, so both ways to the weights agree
    def changes(window, rate):
        trainer = build(
            tiny_folder, tmp_path / f"{window}{rate}", adapter(rate), reduction="dr_dpo", dr_dpo_window=window,
            per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=3, beta_prime=0.5,
        )  # fmt: skip
        return run(trainer)

    two_pass, rescale = changes("two_pass", 0.3), changes("rescale", 0.3)
    assert distance(two_pass, rescale) < 1e-4
    assert distance(changes("two_pass", 0.0), rescale) > 1e-2


@pytest.mark.slow
def test_a_run_with_dropout_resumes_exactly(tiny_folder, tmp_path):
    def end(resume=None):
        trainer = build(
            tiny_folder, tmp_path / "run", adapter(0.3), save_strategy="steps", save_steps=1, max_steps=3,
            reduction="dr_dpo", per_device_train_batch_size=4, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainable(trainer.model)

    straight, again = end(), end(str(tmp_path / "run" / "checkpoint-1"))
    assert all(torch.equal(straight[name], again[name]) for name in straight)


@pytest.mark.slow
def test_the_card_tells_the_dropout_that_was_used(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, adapter(0.25))
    run(trainer)
    trainer.save_model()
    trainer.create_model_card()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.25
    assert "0.25" in (tmp_path / "README.md").read_text()
    assert lora().lora_dropout == 0.0


FUNCTIONAL = {
    "opt": (dict(ffn_dim=128), {"dropout": 0.1}),
    "biogpt": ({}, {"hidden_dropout_prob": 0.1}),
    "xglm": (
        dict(d_model=64, ffn_dim=128, num_layers=2, attention_heads=4, attention_dropout=0.0), {"dropout": 0.1}
    ),
    "bloom": (dict(n_layer=2, n_head=4, hidden_dropout=0.1), {"hidden_dropout": 0.1}),
    "starcoder2": (dict(residual_dropout=0.2), {"residual_dropout": 0.2}),
}  # fmt: skip


def small(kind, tmp_path, tokenizer, **fields):
    folder = tmp_path / f"base-{len(fields)}"
    tiny_model(kind, **fields).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.core("opt")
@pytest.mark.parametrize("kind", FUNCTIONAL)
def test_dropout_by_a_function_is_named_by_its_field_at_construction(kind, tmp_path, tokenizer):
    fields, rates = FUNCTIONAL[kind]
    base, target = small(kind, tmp_path, tokenizer, **fields), LoraConfig(r=4, target_modules="all-linear")
    with pytest.raises(ConfigError, match="a function that disable_dropout does not reach") as raised:
        build(base, tmp_path / "1", target)
    fix = yaml.safe_load(re.search(r"model_init_kwargs: (\{.*?\})", str(raised.value))[1])
    assert fix.keys() >= rates.keys() and set(fix.values()) == {0.0}
    trainer = build(base, tmp_path / "2", target, model_init_kwargs=fix)
    assert not trainer._drops_out
    run(trainer)
    assert losses(trainer)[0] == pytest.approx(0.6931472, abs=1e-5)


@pytest.mark.slow
def test_dropout_by_a_function_may_be_kept(tmp_path, tokenizer):
    base = small("opt", tmp_path, tokenizer, ffn_dim=128)
    trainer = build(base, tmp_path / "1", LoraConfig(r=4, target_modules=["q_proj"]), disable_dropout=False)
    assert trainer._drops_out
    run(trainer)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gptj", "llama", "phi"])
def test_dropout_in_modules_raises_no_alarm(kind, tmp_path, tokenizer):
    fields = {
        "gptj": dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=16, resid_pdrop=0.1),
        "gpt_neox": dict(hidden_dropout=0.1),
        "phi": dict(resid_pdrop=0.1),
    }.get(kind, {})
    model = tiny_model(kind, **fields)
    check_functional_dropout(without_dropout(model))


def falcon(**fields):
    """One whose layer reads its attention's rate from its config."""
    base = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=259, eos_token_id=258)
    return FalconForCausalLM(FalconConfig(**base, **fields))


@pytest.mark.parametrize("field", ["hidden_dropout", "attention_dropout"])
def test_a_rate_that_a_layer_reads_from_its_config_is_found(field):
    with pytest.raises(ConfigError, match=f"{field}: 0.0"):
        check_functional_dropout(without_dropout(falcon(parallel_attn=False, **{field: 0.1})))
    check_functional_dropout(falcon(parallel_attn=False, **{field: 0.0}))


def test_noise_of_a_router_is_found():
    model = tiny_model("mixtral", router_jitter_noise=0.2)
    with pytest.raises(ConfigError, match="router_jitter_noise: 0.0"):
        check_functional_dropout(model)
    check_functional_dropout(tiny_model("mixtral"))


def test_a_rate_that_the_model_does_not_use_raises_no_alarm():
    model = without_dropout(falcon(parallel_attn=False))
    model.transformer.h[0].self_attention.hidden_dropout = 0.3
    check_functional_dropout(model)
    with pytest.raises(ConfigError, match="0.3"):
        # not run, what its modules hold decides
        check_functional_dropout(model, can_run=False)


def test_the_models_modes_and_the_random_state_are_left_alone():
    model = tiny_model("opt", ffn_dim=128)
    model.train()
    model.model.decoder.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    with pytest.raises(ConfigError):
        check_functional_dropout(model)
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model
