"""What trains nothing, or cannot be trained here, is refused at construction in each family of trainers."""

import pytest
from datasets import Dataset
from peft import AdaptionPromptConfig, CPTConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain import ALoLConfig, ALoLTrainer, QAEConfig, RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError
from posttrain.models import tiny_model
from tests import rollouts, scored, training
from tests.conftest import make_pairs
from tests.training import lora

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
FAMILIES = ("preference", "offline", "qae", "kl")


def build(family, model, folder, config=None):
    if family == "preference":
        args = RobustDPOConfig(**training.settings(folder, max_steps=2))
        return RobustDPOTrainer(model, args=args, train_dataset=make_pairs(8), peft_config=config)
    if family == "offline":
        args = ALoLConfig(**scored.settings(folder, max_steps=2))
        return ALoLTrainer(model, args=args, train_dataset=scored.make_scored(8), peft_config=config)
    kind, config_class = rollouts.PRESETS["qae"]
    args = config_class(**rollouts.settings(folder, beta=0.1 if family == "kl" else 0.0))
    return kind(
        model, rollouts.success, args, rollouts.prompts([1, 0, 4, 2]), peft_config=config,
        rollout_func=rollouts.rollouts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapted(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), lora()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_which_nothing_trains_is_refused_with_the_remedy(family, tiny_folder, adapted, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with pytest.raises(ConfigError, match="nothing would train.*is_trainable=True"):
        build(family, PeftModel.from_pretrained(base, str(adapted)), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder).requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing would train.*requires_grad_"):
        build(family, base, tmp_path)
    with pytest.raises(ConfigError, match="inference_mode true"):
        build(family, tiny_folder, tmp_path, LoraConfig(r=4, target_modules=["q_proj"], inference_mode=True))
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    build(family, PeftModel.from_pretrained(base, str(adapted), is_trainable=True), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
        CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
    ],
)
def test_adapters_with_a_forward_of_their_own_are_refused(family, config, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="(a forward of its own|virtual tokens).*Use LoRA"):
        build(family, tiny_folder, tmp_path, config)


@pytest.mark.core("offline")
@pytest.mark.parametrize("family", ["preference", "offline"])
def test_experts_without_an_auxiliary_loss_train_and_that_is_said(family, tmp_path, tokenizer, logged):
    model = tiny_model(
        "llama4_text", intermediate_size_mlp=64, num_local_experts=2, num_experts_per_tok=1, head_dim=16,
        router_aux_loss_coef=0.01,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = build(family, str(tmp_path / "base"), tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert any(not value.equal(before[name]) for name, value in trainer.model.named_parameters())
    assert logged.text.count("returns no auxiliary loss of its experts") == trainer.aux_loss_enabled


@pytest.mark.parametrize("config", [None, lora()])
def test_a_reference_by_its_name_is_refused_with_what_to_write(config, tiny_folder, tmp_path):
    args = RobustDPOConfig(**training.settings(tmp_path))
    with pytest.raises(ConfigError, match="ref_model is .*AutoModelForCausalLM.from_pretrained"):
        RobustDPOTrainer(tiny_folder, tiny_folder, args, train_dataset=make_pairs(4), peft_config=config)


@pytest.mark.parametrize("kind", [RobustDPOConfig, QAEConfig])
def test_a_smoothing_that_no_loss_here_reads_is_refused(kind, tmp_path):
    extra = rollouts.settings(tmp_path) if kind is QAEConfig else training.settings(tmp_path)
    with pytest.raises(ConfigError, match="label_smoothing_factor is 0.1, which this trainer does not use"):
        kind(**extra, label_smoothing_factor=0.1)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_prompts_that_lose_their_beginning_are_counted(tiny_folder, tmp_path, logged):
    long = "same words here " * 8
    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "chosen": [{"role": "assistant", "content": text + "good"}],
         "rejected": [{"role": "assistant", "content": text + "bad"}]}
        for i, text in enumerate((long, long, "", ""))
    ]  # fmt: skip
    for mode, said in (("keep_end", True), ("keep_start", False)):
        logged.clear()
        args = RobustDPOConfig(**training.settings(tmp_path, max_length=64, truncation_mode=mode))
        RobustDPOTrainer(tiny_folder, args=args, train_dataset=Dataset.from_list(rows))
        assert ("keep_end cuts the beginning of 2 of 4 rows" in logged.text) is said
