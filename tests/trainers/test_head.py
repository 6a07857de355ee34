"""The head between backbone and logits, in each family of trainers and in scoring outside them."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from posttrain import ALoLConfig, ALoLTrainer, QAEConfig, QAETrainer, RobustDPOConfig, RobustDPOTrainer
from posttrain.evaluation import score_pairs
from posttrain.models import tiny_model
from tests import rollouts, scored, training
from tests.conftest import make_pairs

TYPES = {"modernbert-decoder": {}, "llama": {}, "recurrent_gemma": dict(num_hidden_layers=3, lru_width=64)}


@pytest.fixture(scope="module", params=TYPES)
def folder(request, tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param, **TYPES[request.param])
    # the size of a trained model's logits
    model.get_output_embeddings().weight.data.mul_(10)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def own_logps(model, ids, mask, temperature=1.0):
    """(B, L - 1) log-probabilities from the model's own logits."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float() / temperature
    return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]


def adapter():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.mark.core("recurrent_gemma-auto", "modernbert-decoder-never")
@pytest.mark.parametrize("setting", ["auto", "never"])
def test_pairs_are_scored_by_the_models_own_logits(folder, tmp_path, setting):
    args = training.settings(tmp_path, pair_loss="dpo", prefix_sharing=setting)
    trainer = RobustDPOTrainer(folder, args=RobustDPOConfig(**args), train_dataset=make_pairs(8), peft_config=adapter())
    trainer.train()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    trainer.model.eval()
    with torch.no_grad():
        scores = trainer.score(trainer.model, batch)
        own = own_logps(trainer.model, batch["input_ids"], batch["attention_mask"]) * batch["completion_mask"][:, 1:]
    found = torch.cat([scores.chosen_logps, scores.rejected_logps])
    torch.testing.assert_close(found, own.sum(1), atol=1e-3, rtol=0)


@pytest.mark.core("modernbert")
def test_answers_are_scored_by_the_models_own_logits(folder, tmp_path):
    args = scored.settings(tmp_path, prefix_sharing="auto")
    trainer = ALoLTrainer(folder, args=ALoLConfig(**args), train_dataset=scored.make_scored(8), peft_config=adapter())
    trainer.train()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    trainer.model.eval()
    with torch.no_grad():
        logps, mask = trainer.score(trainer.model, batch)
        own = own_logps(trainer.model, batch["input_ids"], batch["attention_mask"]) * mask
    torch.testing.assert_close(logps, own, atol=1e-3, rtol=0)


@pytest.mark.core("recurrent_gemma")
def test_rollouts_are_scored_by_the_models_own_logits_at_the_temperature(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    args = rollouts.settings(tmp_path, temperature=0.8, max_steps=1)
    rows = rollouts.prompts([1, 2, 3, 2, 1, 3, 2, 1], demonstrations=False)
    trainer = QAETrainer(
        folder, rollouts.success, QAEConfig(**args), rows, peft_config=adapter(), rollout_func=rollouts.rollouts
    )
    trainer.train()
    ids = torch.randint(97, 120, (4, 12), generator=torch.Generator().manual_seed(0))
    trainer.model.eval()
    with torch.no_grad():
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), 6, compute_entropy=True
        )
        own = own_logps(trainer.model, ids, torch.ones_like(ids), 0.8)[:, -6:]
    torch.testing.assert_close(logps, own, atol=1e-3, rtol=0)
    assert entropies.shape == logps.shape and (entropies > 0).all()


def test_pairs_scored_outside_training_are_too(folder, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    pairs = make_pairs(6)
    found = score_pairs(model, tokenizer, pairs)
    for i, row in enumerate(pairs):
        for side, scores in (("chosen", found.chosen), ("rejected", found.rejected)):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
            whole = torch.tensor([tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"]])
            with torch.no_grad():
                own = own_logps(model, whole, torch.ones_like(whole))[0, len(prompt) - 1 :].sum()
            assert scores[i].item() == pytest.approx(own.item(), abs=2e-3)


@pytest.mark.slow
def test_what_was_chosen_is_said_once(tmp_path, tokenizer, logged):
    logged.set_level("INFO", logger="posttrain")
    for name, times in (("modernbert-decoder", 1), ("llama", 0)):
        logged.clear()
        path = str(tmp_path / name)
        tiny_model(name).save_pretrained(path)
        trainer = RobustDPOTrainer(
            path, args=RobustDPOConfig(**training.settings(tmp_path / "run", pair_loss="dpo")),
            train_dataset=Dataset.from_list(list(make_pairs(8))), processing_class=tokenizer, peft_config=adapter(),
        )  # fmt: skip
        trainer.train()
        assert logged.text.count("log-probabilities come from the model's own head") == times
