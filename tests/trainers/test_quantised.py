import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import ModelConfig, get_quantization_config

from posttrain import RobustDPOConfig, RobustDPOTrainer
from tests.conftest import make_pairs
from tests.training import lora, settings, trainable


def test_a_4bit_base_trains_two_steps_and_its_adapter_reloads(tiny_folder, tmp_path):
    quantization = get_quantization_config(ModelConfig(load_in_4bit=True))
    trainer = RobustDPOTrainer(
        tiny_folder,
        args=RobustDPOConfig(**settings(tmp_path / "run", reduction="dr_dpo", precompute_ref_log_probs=True)),
        train_dataset=make_pairs(16),
        peft_config=lora(),
        quantization_config=quantization,
    )
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == "Linear4bit" and layer.weight.quant_type == "nf4"
    before = trainable(trainer.model)
    trainer.train()
    assert trainer._sharing.active, "prefix sharing holds for a quantised base too"
    after = trainable(trainer.model)
    assert all("lora" in name for name in before)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    trainer.save_model(str(tmp_path / "saved"))

    ids = torch.arange(10, 42).view(2, 16)
    trained = trainer.model.eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=quantization, dtype=trained.dtype)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    with torch.no_grad():
        expected, logits = trained(input_ids=ids).logits, reloaded(input_ids=ids).logits
        with reloaded.disable_adapter():
            plain = reloaded(input_ids=ids).logits
    # bf16 adapters: their rounding is all that may differ
    torch.testing.assert_close(logits, expected, atol=2e-2, rtol=2e-2)
    assert (logits - plain).abs().max() > 5 * (logits - expected).abs().max()


@pytest.mark.slow
def test_an_evaluation_in_eval_mode_leaves_the_gradients_right(tiny_folder, tmp_path):
    # bitsandbytes repacks 4-bit weights in eval mode on some CPUs, into a layout without a backward
    def gradients(evaluate_first):
        trainer = RobustDPOTrainer(
            tiny_folder,
            args=RobustDPOConfig(**settings(tmp_path / "run", pair_loss="dpo", max_steps=1, learning_rate=1.0)),
            train_dataset=make_pairs(8),
            peft_config=lora(),
            quantization_config=get_quantization_config(ModelConfig(load_in_4bit=True)),
        )
        if evaluate_first:
            trainer.evaluate(make_pairs(4, seed=9))
        before = trainable(trainer.model)
        trainer.train()
        return {name: p - before[name] for name, p in trainable(trainer.model).items()}

    plain, evaluated = gradients(False), gradients(True)
    moved = [name for name in plain if "lora_B" in name]
    assert moved and all(plain[name].any() for name in moved), "every layer's B moves in the first step"
    assert all(torch.equal(plain[name], evaluated[name]) for name in plain)


@pytest.mark.slow
def test_packed_pairs_score_as_padded_ones(tiny_folder, tmp_path):
    scores = {}
    for setting in ("never", "always"):
        trainer = RobustDPOTrainer(
            tiny_folder,
            args=RobustDPOConfig(**settings(tmp_path / "run", pair_loss="dpo", prefix_sharing=setting)),
            train_dataset=make_pairs(8),
            peft_config=lora(),
            quantization_config=get_quantization_config(ModelConfig(load_in_4bit=True)),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            scores[setting] = trainer.score(trainer.model, batch).chosen_logps
    # sums over some 30 tokens computed in bf16
    torch.testing.assert_close(scores["always"], scores["never"], atol=0.1, rtol=2e-3)
