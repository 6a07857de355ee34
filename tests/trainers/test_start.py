"""What trains nothing, or cannot be trained here, is refused at construction in each family of trainers."""

import pytest
from peft import AdaptionPromptConfig, CPTConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain import ALoLConfig, ALoLTrainer, RobustDPOConfig, RobustDPOTrainer
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
