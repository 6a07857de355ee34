"""Each way a LoRA adapter can begin, in each family of trainers: its reference, its saved form, its resumption."""

import dataclasses
import json
import sys
import types

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain import ALoLConfig, ALoLTrainer, QAEConfig, QAETrainer, RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError
from posttrain.hub.merging import merge_adapter
from posttrain.mechanisms import initial_adapter
from posttrain.run import adapter_checks
from tests import rollouts, scored, training
from tests.conftest import make_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
    # what PEFT says of embeddings, and LoRA-GA of its hooks
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]
FAMILIES = ("preference", "offline", "policy_gradient")
IDS = torch.arange(10, 42).view(2, 16)


def config(how=True, **settings):
    return LoraConfig(**(dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]) | settings), **start(how))


def start(how) -> dict:
    extra = {
        "corda": dict(corda_config=CordaConfig(corda_method="kpm")),
        "lora_ga": dict(lora_ga_config=LoraGAConfig()),
    }
    extra["eva"] = dict(eva_config=EvaConfig())
    return dict(init_lora_weights=how) | extra.get(how, {})


def prepared(folder, adapter):
    """The model, with the pass over data that some initialisations need, and the adapter's config if it is to come."""
    how = adapter.init_lora_weights
    if how not in ("corda", "lora_ga", "eva"):
        return folder, adapter
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(259, (8, 24), generator=torch.Generator().manual_seed(1))
    if how == "eva":
        model = get_peft_model(model, adapter, low_cpu_mem_usage=True)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        initialize_lora_eva_weights(model, [batch] * 4, show_progress_bar=False)
        return model, None
    if how == "corda":
        # PEFT's module takes this decorator from a package that it does not require
        sys.modules.setdefault("attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
        from peft.tuners.lora.corda import preprocess_corda

        with torch.no_grad():
            preprocess_corda(model, adapter, run_model=lambda: [model(input_ids=row[None]) for row in ids])
    else:
        preprocess_loraga(model, adapter, lambda: model(input_ids=ids, labels=ids).loss.backward())
        model.zero_grad()
    return model, adapter


def build(family, model, adapter, output_dir, tokenizer, **overrides):
    given = dict(peft_config=adapter, processing_class=tokenizer)
    steps = dict(max_steps=2, save_strategy="steps", save_steps=1, optim="adamw_torch", learning_rate=2e-2) | overrides
    if family == "preference":
        args = RobustDPOConfig(**training.settings(output_dir, pair_loss="dpo", **steps))
        return RobustDPOTrainer(model, args=args, train_dataset=make_pairs(16), **given)
    if family == "offline":
        args = ALoLConfig(**scored.settings(output_dir, **steps))
        return ALoLTrainer(model, args=args, train_dataset=scored.make_scored(16), **given)
    args = QAEConfig(**rollouts.settings(output_dir, **dict(beta=0.1) | steps))
    rows = rollouts.prompts([1, 2, 3, 2, 1, 3, 2, 1], demonstrations=False)
    return QAETrainer(model, rollouts.success, args, rows, rollout_func=rollouts.rollouts, **given)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def reloaded(base, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


INITS = [True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "mica", "corda", "lora_ga", "eva"]


@pytest.mark.core("pissa-preference")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", INITS)
def test_a_saved_adapter_on_the_base_is_the_model_that_was_trained(family, how, tiny_folder, tokenizer, tmp_path):
    model, adapter = prepared(tiny_folder, config(how))
    trainer = build(family, model, adapter, tmp_path / "run", tokenizer)
    begun = logits(trainer.model)
    trainer.model.train()
    trainer.train()
    trainer.save_model()
    trained = logits(trainer.model)
    moved = (trained - begun).abs().max()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        gap = (logits(reloaded(tiny_folder, folder)) - trained).abs().max()
        assert gap < 1e-5 and moved > 100 * gap
        saved = json.loads((folder / "adapter_config.json").read_text())
        assert saved["init_lora_weights"] is True or not initial_adapter.changes_base(LoraConfig(**start(how)))
    if how is not False:
        untrained = logits(AutoModelForCausalLM.from_pretrained(tiny_folder))
        assert (begun - untrained).abs().max() < 1e-5, "the start is the base, whoever holds which part of it"
    if family == "policy_gradient":
        kl = next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
        assert kl < 1e-8, "the reference is the policy's start"
    if family == "preference":
        assert abs(training.losses(trainer)[0] - 0.6931472) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "how"),
    [*((family, "pissa") for family in FAMILIES), *(("preference", how) for how in ("pissa_niter_4", "olora", False)),
     ("offline", "lora_ga"), ("policy_gradient", False)],
)  # fmt: skip
def test_a_run_resumes_exactly_from_an_adapter_of_any_start(family, how, tiny_folder, tokenizer, tmp_path):
    def run(resume=None):
        model, adapter = prepared(tiny_folder, config(how))
        trainer = build(family, model, adapter, tmp_path / "run", tokenizer, max_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        return training.trainable(trainer.model), logits(trainer.model)

    straight, at_the_end = run()
    torch.manual_seed(99)
    again, there = run(str(tmp_path / "run" / "checkpoint-1"))
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    assert torch.equal(at_the_end, there)


@pytest.mark.slow
def test_a_base_that_came_out_otherwise_is_moved_to_the_checkpoint(tiny_folder, tokenizer, tmp_path, logged):
    def run(seed, resume=None):
        trainer = build("preference", tiny_folder, config("pissa_niter_0"), tmp_path / "run", tokenizer, seed=seed,
                        max_steps=3, check_resume=False)  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return logits(trainer.model)

    straight = run(3)
    other = build("preference", tiny_folder, config("pissa_niter_0"), tmp_path / "run", tokenizer, seed=4,
                  max_steps=3, check_resume=False)  # fmt: skip
    first = initial_adapter.matrices(other.model)
    other.args.data_seed = 3
    other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert "the base is moved to fit that checkpoint" in logged.text
    now = initial_adapter.halves(tmp_path / "run" / "checkpoint-3")[1]
    assert any(not torch.equal(first[name], now[name]) for name in now)
    torch.testing.assert_close(logits(other.model), straight, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_best_checkpoint_of_a_converted_adapter_is_loaded_back(tiny_folder, tokenizer, tmp_path):
    trainer = RobustDPOTrainer(
        tiny_folder,
        args=RobustDPOConfig(
            **training.settings(
                tmp_path / "run",
                pair_loss="dpo",
                save_strategy="steps",
                save_steps=1,
                eval_strategy="steps",
                eval_steps=1,
                load_best_model_at_end=True,
                max_steps=3,
                learning_rate=0.5,
            )  # fmt: skip
        ),
        train_dataset=make_pairs(8),
        eval_dataset=make_pairs(8, seed=7),
        peft_config=config("pissa"),
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    torch.testing.assert_close(logits(trainer.model), logits(reloaded(tiny_folder, best)), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(use_rslora=True),
        dict(rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 5}),
        dict(use_dora=True),
        dict(target_modules="all-linear", modules_to_save=["norm"]),
    ],
)
def test_a_converted_adapter_keeps_its_scale_and_other_weights(settings, tiny_folder, tokenizer, tmp_path):
    trainer = build("preference", tiny_folder, config("pissa", **settings), tmp_path / "run", tokenizer)
    begun = logits(trainer.model)
    trainer.train()
    trainer.save_model()
    trained = logits(trainer.model)
    gap = (logits(reloaded(tiny_folder, tmp_path / "run")) - trained).abs().max()
    assert gap < 1e-5 and (trained - begun).abs().max() > 100 * gap


@pytest.mark.slow
def test_a_merged_converted_adapter_is_the_model_that_was_trained(tiny_folder, tokenizer, tmp_path):
    trainer = build("offline", tiny_folder, config("olora"), tmp_path / "run", tokenizer)
    trainer.train()
    trainer.save_model()
    assert merge_adapter(tmp_path / "run", tmp_path / "merged", dtype="float32").top1_agreement == 1.0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(trainer.model), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_precomputed_and_live_references_of_an_adapter_that_changed_the_base_agree(tiny_folder, tokenizer, tmp_path):
    losses = []
    for precompute in (True, False):
        trainer = build("preference", tiny_folder, config("pissa"), tmp_path / str(precompute), tokenizer,
                        precompute_ref_log_probs=precompute, prefix_sharing="never")  # fmt: skip
        trainer.train()
        losses.append(training.losses(trainer))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("loftq", "'loftq', which replaces the base's weights"),
        ("eva", "'eva', which needs a pass over data"),
        ("corda", "run preprocess_corda on the loaded model"),
        ("lora_ga", "run preprocess_loraga on the loaded model"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_that_could_not_be_saved_or_was_not_made_is_refused(family, how, said, tokenizer, tmp_path):
    adapter = config()
    adapter.init_lora_weights = how
    with pytest.raises(ConfigError, match="init_lora_weights is") as raised:
        build(family, "no/such-model", adapter, tmp_path, tokenizer)
    assert said in str(raised.value)


def test_an_adapter_that_has_changed_its_base_before_is_refused(tiny_folder, tokenizer, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config("pissa"))
    with pytest.raises(ConfigError, match="comes with an adapter of init_lora_weights 'pissa'"):
        build("offline", model, None, tmp_path, tokenizer)


@pytest.mark.parametrize("family", ["preference", "policy_gradient"])
def test_trained_biases_under_a_live_reference_are_refused(family, tiny_folder, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="the adapter's bias is 'all'"):
        build(family, tiny_folder, config(bias="all"), tmp_path, tokenizer)


@pytest.mark.slow
def test_a_policy_that_is_not_its_reference_is_refused_in_policy_gradients_too(tiny_folder, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.lm_head.weight.data.mul_(3)
    trainer = build("policy_gradient", model, None, tmp_path / "run", tokenizer, learning_rate=1e-4)
    with pytest.raises(ConfigError, match="policy and reference differ by .* before the first step"):
        trainer.train()
    build("policy_gradient", model, None, tmp_path / "two", tokenizer, check_reference=False).train()
    build("policy_gradient", model, None, tmp_path / "three", tokenizer, beta=0.0).train()


def test_the_copy_of_a_given_adapter_has_its_embedding_too(tiny_folder, tokenizer, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder), config(target_modules=["q_proj", "embed_tokens"])
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    trainer = build("policy_gradient", model, None, tmp_path / "run", tokenizer, max_steps=1)
    trainer.train()
    assert next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("how", ["prompt", "prefix", "p"])
def test_learned_prompts_are_not_held_to_the_zero_margin(how, tiny_folder, tokenizer, tmp_path):
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    kind = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig, "p": PromptEncoderConfig}[how]
    adapter = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = build("preference", tiny_folder, adapter, tmp_path / "run", tokenizer, save_strategy="no")
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        policy = trainer.score(trainer.model, dict(batch)).chosen_logps
        reference = trainer.compute_ref_log_probs(trainer.model, dict(batch))[0]
        with trainer.model.disable_adapter():
            base = trainer.score(trainer.model, dict(batch)).chosen_logps
    assert torch.equal(reference, base) and not torch.allclose(policy, base)
    before = training.trainable(trainer.model)
    trainer.train()
    after = training.trainable(trainer.model)
    assert any(not torch.equal(after[name], before[name]) for name in before)


ON_EMBEDDINGS = {
    "lora": dict(target_modules=["q_proj", "embed_tokens"]),
    "copy": dict(modules_to_save=["embed_tokens"]),
    "head": dict(modules_to_save=["lm_head"]),
    "tokens": dict(trainable_token_indices=[64, 68, 97, 101]),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gaussian", "pissa", "olora"])
def test_a_start_on_linear_layers_and_an_embedding_is_saved_whole(how, base, tokenizer, tmp_path):
    adapter = config(how, target_modules=["q_proj", "embed_tokens"])
    trainer = build("preference", base, adapter, tmp_path / "run", tokenizer)
    begun = logits(trainer.model)
    trainer.train()
    trainer.save_model()
    trained = logits(trainer.model)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        gap = (logits(reloaded(base, folder)) - trained).abs().max()
        assert gap < 1e-5 and (trained - begun).abs().max() > 100 * gap
    merge_adapter(tmp_path / "run", tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=0)
    again = build("preference", base, adapter, tmp_path / "run", tokenizer)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert torch.equal(logits(again.model), trained)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["c_attn"], ["c_proj"], "all-linear"])
def test_olora_on_transposed_weights_is_refused_and_pissa_is_not(targets, tokenizer, tmp_path):
    from posttrain.models import tiny_model

    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = config("pissa", target_modules=targets, fan_in_fan_out=True)
    assert build("preference", str(tmp_path / "base"), adapter, tmp_path / "pissa", tokenizer)._start.converts
    adapter = config("olora", target_modules=targets, fan_in_fan_out=True)
    with pytest.raises(ConfigError, match="is 'olora', and c_\\w+ is a Conv1D"):
        build("preference", str(tmp_path / "base"), adapter, tmp_path / "olora", tokenizer)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "orthogonal", "mica"])
def test_starts_from_weights_with_target_parameters_are_refused_before_the_model_loads(how, tokenizer, tmp_path):
    adapter = config(how, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    with pytest.raises(ConfigError, match=f"init_lora_weights is '{how}' with target_parameters"):
        build("offline", "no/such-model", adapter, tmp_path, tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", [["mine"], ["mine", "ref"], ["other", "default"], ["ref"]])
def test_a_model_whose_own_adapter_has_another_name_is_refused(family, names, tiny_folder, tokenizer, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    with pytest.raises(ConfigError, match=f"active adapter is '{names[0]}'; it must be 'default'") as raised:
        build(family, model, None, tmp_path, tokenizer)
    remedy = 'Call model.set_adapter("default") first' if "default" in names else "Leave adapter_name out"
    assert remedy in str(raised.value)
    if "default" in names:
        model.set_adapter("default")
        assert build(family, model, None, tmp_path, tokenizer).model.active_adapters == ["default"]


@pytest.mark.parametrize("given", ["config", "model"])
def test_multitask_prompts_are_refused(given, tiny_folder, tokenizer, tmp_path):
    from peft import MultitaskPromptTuningConfig

    adapter = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2)
    model = tiny_folder
    if given == "model":
        model, adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), adapter), None
    with pytest.raises(ConfigError, match="multitask prompt tuning, which must be told each row's task"):
        build("preference", model, adapter, tmp_path, tokenizer)


@pytest.mark.slow
def test_the_rank_of_other_adapters_is_theirs(tiny_folder, tokenizer, tmp_path):
    from peft import IA3Config, LoHaConfig, OFTConfig

    for number, adapter in enumerate(
        (
            OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]),
            LoHaConfig(r=2, target_modules=["q_proj"]),
            IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        )
    ):
        trainer = build("preference", tiny_folder, adapter, tmp_path / str(number), tokenizer)
        assert trainer.model.peft_config["default"].peft_type == adapter.peft_type
    with pytest.raises(ConfigError, match="the LoRA rank .* is 0"):
        build("preference", tiny_folder, config(r=0), tmp_path / "lora", tokenizer)


@pytest.mark.parametrize(
    "targets", [["q_proj", "embed_tokens"], ["q_proj", "model.embed_tokens"], r".*(q_proj|embed_tokens)"]
)
def test_an_adapter_that_would_be_carried_over_to_a_tied_head_is_refused(targets, base, tokenizer, tmp_path):
    tied = AutoConfig.from_pretrained(base).tie_word_embeddings
    adapter = config(target_modules=targets, ensure_weight_tying=True)
    if tied:
        with pytest.raises(ConfigError, match="ensure_weight_tying is set with embed_tokens in target_modules"):
            build("preference", base, adapter, tmp_path, tokenizer)
    adapter_checks.check_tying(config(target_modules=targets), AutoConfig.from_pretrained(base))
    for others in ("all-linear", ["q_proj"], r".*q_proj"):
        adapter = config(target_modules=others, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
        adapter_checks.check_tying(adapter, AutoConfig.from_pretrained(base))


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request, tmp_path_factory, tokenizer):
    from posttrain.models import tiny_model

    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(tie_word_embeddings=request.param == "tied").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.core("untied-preference-tokens")
@pytest.mark.parametrize("which", ON_EMBEDDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_embeddings_train_save_and_merge(family, which, base, tokenizer, tmp_path):
    trainer = build(family, base, config(**ON_EMBEDDINGS[which]), tmp_path / "run", tokenizer, save_strategy="no")
    before = training.trainable(trainer.model)
    trainer.train()
    moved = [name for name, p in training.trainable(trainer.model).items() if not torch.equal(p, before[name])]
    assert any("embed" in name or "lm_head" in name for name in moved)
    batch = torch.randint(97, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs = dict(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
    trainer.model.eval()
    with torch.no_grad():
        scored = trainer.model(**inputs, labels=batch, fused_lm_head=True).log_probs
        own = torch.log_softmax(trainer.model(**inputs).logits[:, :-1] / getattr(trainer, "temperature", 1.0), -1)
    torch.testing.assert_close(scored, own.gather(-1, batch[:, 1:, None])[..., 0], atol=1e-4, rtol=0)
    trainer.save_model()
    trained = logits(trainer.model)
    torch.testing.assert_close(logits(reloaded(base, tmp_path / "run")), trained, atol=1e-5, rtol=0)
    assert merge_adapter(tmp_path / "run", tmp_path / "merged", dtype="float32").top1_agreement == 1.0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_the_head_is_refused(family, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="lora_target_modules names lm_head"):
        build(family, "no/such-model", config(target_modules=["q_proj", "lm_head"]), tmp_path, tokenizer)


@pytest.mark.core("tied-list", "untied-head")
@pytest.mark.parametrize("family", ["preference", "offline"])
@pytest.mark.parametrize("kind", ["list", "dictionary", "alone", "head"])
def test_tokens_to_train_that_no_row_holds_are_named(family, kind, base, tokenizer, tmp_path, logged):
    there, absent = tokenizer.encode("e")[-1], tokenizer.encode("\x01")[-1]
    adapter = {
        "list": config(trainable_token_indices=[there, absent]),
        "dictionary": config(trainable_token_indices={"embed_tokens": [there, absent]}),
        "alone": TrainableTokensConfig(token_indices=[there, absent]),
        "head": config(trainable_token_indices={"lm_head": [absent], "embed_tokens": [there]}),
    }[kind]
    tied = AutoConfig.from_pretrained(base).tie_word_embeddings
    if tied and kind == "alone":
        with pytest.raises(ConfigError, match="Applying a PEFT adapter to `lm_head` is not supported"):
            build(family, base, adapter, tmp_path, tokenizer)
        return
    build(family, base, adapter, tmp_path, tokenizer)
    name = repr(tokenizer.convert_ids_to_tokens([absent])[0])
    warned = (
        f"1 of the 2 tokens that the adapter is to train are in no row, so their embeddings stay as they are: {name}"
    )
    tied = AutoConfig.from_pretrained(base).tie_word_embeddings
    assert (warned in logged.text) is (not tied and kind != "head")
    assert ("in no row" in logged.text) is (not tied and kind != "head")
