from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, ModelConfig, SFTConfig, SFTTrainer, get_quantization_config

from posttrain import ALoLConfig, ALoLTrainer
from posttrain.data.scored import baselines
from posttrain.errors import ConfigError, DataError, DivergedError
from posttrain.mechanisms import value_head
from posttrain.objectives import offline
from posttrain.rewards import UserReward
from posttrain.run import reference, watches
from posttrain.trainers.offline.a_lol_answers import ALoLAnswers
from tests.runs import identical
from tests.scored import beyond, build, entries, make_scored, settings, train
from tests.training import distance, lora

PARENT = dict(trainer_class=SFTTrainer, config_class=SFTConfig, use_cpu=True, bf16=False, gradient_checkpointing=False)


@pytest.fixture
def forwards(monkeypatch):
    """The rows of each reference batch that was forwarded."""
    calls = []
    original = ALoLTrainer.score

    def counted(self, model, batch):
        calls.append(batch["input_ids"].size(0))
        return original(self, model, batch)

    monkeypatch.setattr(ALoLTrainer, "score", counted)
    return calls


@pytest.mark.core("lora")
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_nll_is_sft_bit_for_bit_at_a_rate_times_the_tokens_of_an_answer(tiny_folder, tmp_path, peft):
    # 7 bytes and the end of the turn: 8 tokens, a power of two, so that the scaling is exact
    rows, split = (
        make_scored(16, length=7),
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, peft=peft),
    )
    reference, parent = train(tiny_folder, tmp_path / "trl", rows, learning_rate=0.08, **split, **PARENT)
    change, trainer = train(tiny_folder, tmp_path / "ours", rows, learning_rate=0.01, variant="nll", **split)
    assert identical(change, reference)
    for own, theirs in zip(entries(trainer), entries(parent), strict=True):
        assert own["loss"] == pytest.approx(8 * theirs["loss"], rel=1e-5)
        assert own["nll/token"] == pytest.approx(theirs["loss"], rel=1e-5)
        for name in ("entropy", "mean_token_accuracy", "num_tokens"):
            assert own[name] == pytest.approx(theirs[name], rel=1e-5)


def test_nll_is_sft_times_tokens_over_answers_whatever_their_lengths(tiny_folder, tmp_path):
    rows, one = make_scored(8), dict(max_steps=1)
    reference, _ = train(tiny_folder, tmp_path / "trl", rows, **one, **PARENT)
    change, trainer = train(tiny_folder, tmp_path / "ours", rows, variant="nll", **one)
    labels = trainer.train_dataset["labels"]
    factor = sum(label != -100 for row in labels for label in row) / len(rows)
    assert len({sum(label != -100 for label in row) for row in labels}) > 3
    assert distance(change, {name: factor * value for name, value in reference.items()}) <= 1e-5
    assert distance(change, reference) > 0.5


METHODS = {
    "nll": {},
    "wbc": {},
    "r_gold": {},
    "r_lol": {},
    "a_lol": dict(clip=0.2),
    "a_lol_seq": {},
    "a_lol_ref_free": {},
    "a_lol_kl": dict(kl_beta=0.1),
}


@pytest.mark.core("a_lol_seq", "r_lol")
@pytest.mark.parametrize("variant", METHODS)
def test_a_run_is_that_of_the_pure_function_on_full_logits(tiny_folder, tmp_path, variant):
    rows, steps = make_scored(8), 2
    more = METHODS[variant] | dict(max_steps=steps, learning_rate=0.02, peft=False)
    change, trainer = train(tiny_folder, tmp_path, rows, variant=variant, **more)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = trainer.data_collator(list(trainer.train_dataset))
    mask = batch["labels"][:, 1:] != -100

    def log_probabilities():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)

    with torch.no_grad():
        reference = log_probabilities()
    weight = offline.weight_of(variant)
    weights = {weight: batch[weight]} if weight else {}
    for entry in entries(trainer):
        losses = offline.a_lol(
            log_probabilities(), reference, mask, variant=variant, clip=trainer.args.clip, kl_beta=trainer.args.kl_beta,
            **weights,
        )  # fmt: skip
        model.zero_grad()
        losses.mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.02 * parameter.grad
        constant = 0.1 * (reference * mask).sum(1).mean().item() if variant == "a_lol_kl" else 0.0
        assert entry["loss"] == pytest.approx(losses.mean().item() + constant, rel=1e-5)
    assert distance(change, {n: p.detach() - before[n] for n, p in model.named_parameters()}) <= 1e-4
    if variant in offline.NEEDS_REFERENCE:
        first, second = entries(trainer)
        assert first["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
        assert second["ratio/mean"] != pytest.approx(1.0, abs=1e-2), "the ratio plays a part"


@pytest.mark.slow
def test_rows_without_gradient_are_dropped_before_their_reference_is_computed(tiny_folder, tmp_path, forwards):
    rows = make_scored(16)
    mean = sum(rows["reward"]) / 16
    beat = [i for i, reward in enumerate(rows["reward"]) if reward > mean]
    trainer = build(tiny_folder, tmp_path, rows)
    assert sum(forwards) == len(beat) == len(trainer.train_dataset) < 16
    assert trainer.train_dataset["reward"][:] == [rows["reward"][i] for i in beat]
    assert trainer.train_dataset["advantage"][:] == pytest.approx([rows["reward"][i] - mean for i in beat])
    found = trainer.advantages
    assert (found.rows, found.kept, found.positive) == (16, len(beat), len(beat) / 16)
    # the cache knows them: another batch size, another variant, other rows beside them
    for change in (dict(per_device_eval_batch_size=3), dict(variant="a_lol_seq"), dict(variant="r_lol")):
        forwards.clear()
        again = build(tiny_folder, tmp_path / "again", rows, **change)
        assert sum(forwards) == (16 - len(beat) if change.get("variant") == "r_lol" else 0)
    assert again.train_dataset[beat[0]]["ref_logps"] == trainer.train_dataset[0]["ref_logps"]


def test_a_dropped_row_had_no_part_in_the_update(tiny_folder, tmp_path):
    # with keep_negative and values above all rewards but some, dropping is undone: the same sum over fewer rows
    rows = make_scored(8)
    kept, _ = train(tiny_folder, tmp_path / "kept", rows, variant="a_lol_ref_free", max_steps=1)
    mean = sum(rows["reward"]) / 8
    clamped = [max(reward - mean, 0.0) for reward in rows["reward"]]
    everything = rows.remove_columns("reward").add_column("reward", clamped)
    share = sum(value > 0 for value in clamped) / 8
    whole, trainer = train(
        tiny_folder, tmp_path / "whole", everything, variant="wbc", max_steps=1, learning_rate=0.01 / share
    )
    assert len(trainer.train_dataset) == share * 8
    assert distance(whole, {name: value / share for name, value in kept.items()}) <= 1e-5


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_reference_is_the_start_and_there_is_no_second_model(tiny_folder, tmp_path, kind):
    peft = kind == "lora"
    trainer = build(tiny_folder, tmp_path, peft=peft)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for row in list(trainer.train_dataset)[:3]:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
        answer = [logp for logp, label in zip(logps.tolist(), row["labels"][1:], strict=True) if label != -100]
        assert row["ref_logps"] == pytest.approx(answer, abs=1e-5)
    assert not hasattr(trainer, "ref_model")
    if peft:
        assert list(trainer.model.peft_config) == ["default"]


@pytest.mark.slow
def test_the_reference_of_a_trained_adapter_is_that_adapter(tiny_folder, tmp_path, tokenizer):
    _, first = train(tiny_folder, tmp_path / "first", variant="nll", learning_rate=0.05)
    first.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter", is_trainable=True
    )
    trainer = build(model, tmp_path / "second", peft=False, processing_class=tokenizer, max_steps=1)
    base = build(tiny_folder, tmp_path / "base")
    gap = sum(
        abs(a - b)
        for a, b in zip(trainer.train_dataset[0]["ref_logps"], base.train_dataset[0]["ref_logps"], strict=True)
    )
    assert gap > 0.1
    trainer.train()
    assert entries(trainer)[0]["ratio/mean"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
def test_a_wrong_reference_stops_the_run_before_the_first_step(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="the policy differs from its own start by .* nats per token before the first"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.slow
def test_a_4bit_base_trains(tiny_folder, tmp_path):
    quantization = get_quantization_config(ModelConfig(load_in_4bit=True))
    change, trainer = train(tiny_folder, tmp_path, quantization_config=quantization)
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == "Linear4bit" and layer.weight.quant_type == "nf4"
    assert all("lora" in name for name in change) and any(value.any() for value in change.values())
    assert entries(trainer)[0]["ratio/mean"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.slow
def test_precompute_leaves_the_random_state_alone(tiny_folder, tmp_path):
    build(tiny_folder, tmp_path)
    warm = torch.random.get_rng_state()
    build(tiny_folder, tmp_path, ref_cache_dir=str(tmp_path / "other"))
    assert torch.equal(torch.random.get_rng_state(), warm)
    assert list((tmp_path / "other").glob("*.safetensors"))


@pytest.mark.slow
def test_sampling_draws_by_weight_and_counts_every_row_alike(tiny_folder, tmp_path):
    rows = make_scored(16)
    trainer = build(tiny_folder, tmp_path / "a", rows, advantage_weighting="sample", variant="a_lol_ref_free")
    weights = torch.tensor(trainer.train_dataset["weight"][:])
    drawn = list(trainer._get_train_sampler())
    assert len(drawn) == len(weights) and max(drawn) < len(weights)
    # p_i x mean weight = w_i / N: the expectation of `weight`, row by row
    mask, logps = torch.ones(2, 1, dtype=torch.bool), torch.tensor([[-1.0], [-2.0]])
    trainer.model.train()
    losses = trainer.sequence_losses(logps, mask, {"advantages": weights[:2]})
    assert losses.tolist() == pytest.approx([weights.mean().item(), 2 * weights.mean().item()])
    trainer.model.eval()
    held_out = trainer.sequence_losses(logps, mask, {"advantages": weights[:2]})
    assert held_out.tolist() == pytest.approx([weights[0].item(), 2 * weights[1].item()]), "no drawing in evaluation"
    both = build(tiny_folder, tmp_path / "b", rows, advantage_weighting="sample_and_weight", variant="a_lol_ref_free")
    both.model.train()
    assert both.sequence_losses(logps, mask, {"advantages": weights[:2]}).tolist() == pytest.approx(held_out.tolist())
    assert list(both._get_train_sampler()) == drawn, "the stream is the seed's"


@pytest.mark.slow
def test_a_checkpoint_of_other_rows_is_not_resumed(tiny_folder, tmp_path):
    train(tiny_folder, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    rows = make_scored(16)
    other = rows.remove_columns("reward").add_column("reward", [1 - reward for reward in rows["reward"]])
    with pytest.raises(ConfigError, match="data: other rows there than here"):
        build(tiny_folder, tmp_path, other)
    assert build(tiny_folder, tmp_path, rows)


def test_values(tiny_folder, tmp_path):
    rows = make_scored(12, prompts=4, baseline=[0.25] * 12)
    rewards = rows["reward"][:]
    means = [sum(rewards[i % 4 :: 4]) / 3 for i in range(12)]
    for value, expected in (("per_prompt", means), ("column", [0.25] * 12), ("mean", [sum(rewards) / 12] * 12)):
        trainer = build(tiny_folder, tmp_path, rows, value=value, variant="a_lol_ref_free", check_resume=False)
        wanted = [r - v for r, v in zip(rewards, expected, strict=True) if r > v]
        assert trainer.train_dataset["advantage"][:] == pytest.approx(wanted)
    kept = build(
        tiny_folder, tmp_path, rows, variant="a_lol_ref_free", keep_negative_advantages=True, check_resume=False
    )
    assert len(kept.train_dataset) == 12 and min(kept.train_dataset["advantage"]) < 0
    kl = build(tiny_folder, tmp_path, rows, variant="a_lol_kl", kl_beta=0.05, check_resume=False)
    assert len(kl.train_dataset) == 12, "answers below their value are pushed down"


@pytest.mark.slow
def test_pairs_plain_text_and_a_reward_function(tiny_folder, tmp_path, tokenizer):
    pairs = Dataset.from_list(
        [
            {
                "prompt": f"{i} ",
                "chosen": "good",
                "rejected": "bad" * i,
                "chosen_reward": 1.0,
                "rejected_reward": 0.1 * i,
            }
            for i in range(1, 5)
        ]
    )
    _, trainer = train(tiny_folder, tmp_path / "pairs", pairs)
    assert trainer.train_dataset["completion"][:] == ["good<|im_end|>"] * 4
    assert all(row["labels"][-1] == tokenizer.eos_token_id for row in trainer.train_dataset)
    calls = []

    def by_length(prompts, completions, **columns):
        calls.extend(completions)
        return [float(len(text)) for text in completions]

    scored = build(tiny_folder, tmp_path / "scored", pairs, reward_func=by_length)
    assert calls == [text for i in range(1, 5) for text in ("good", "bad" * i)]
    assert scored.train_dataset["reward"][:] == [6.0, 9.0, 12.0]


@pytest.mark.slow
def test_evaluation_counts_every_row_once_whatever_its_batch_size(tiny_folder, tmp_path):
    rows, held_out = make_scored(16), make_scored(11, seed=10)
    _, trainer = train(tiny_folder, tmp_path, rows, eval_dataset=held_out)
    results = []
    for size in (11, 3):
        trainer.args.per_device_eval_batch_size = size
        results += [trainer.evaluate(), trainer.evaluate(held_out)]
    kept = [{k: v for k, v in r.items() if "/" in k or k == "eval_loss"} for r in results]
    for other in kept[1:]:
        assert other == pytest.approx(kept[0], rel=1e-5)
    # held-out answers are compared with what the training rows earned
    value = sum(rows["reward"]) / 16
    advantages = [reward - value for reward in held_out["reward"]]
    assert kept[0]["eval_advantages/mean"] == pytest.approx(sum(advantages) / 11, rel=1e-5)
    assert kept[0]["eval_advantages/positive_share"] == pytest.approx(sum(a > 0 for a in advantages) / 11)


@pytest.mark.slow
def test_held_out_rows_come_before_full_fine_tuning_begins(tiny_folder, tmp_path):
    _, trainer = train(tiny_folder, tmp_path, peft=False, max_steps=1, eval_dataset={"a": make_scored(4, seed=8)})
    assert trainer.evaluate()["eval_a_loss"] > 0
    with pytest.raises(ConfigError, match="eval_dataset came after training had begun, when the reference's weights"):
        trainer.evaluate(make_scored(4, seed=9))


def head(**overrides):
    return (
        dict(value="head", value_folds=2, value_epochs=2, value_learning_rate=0.05, variant="a_lol_ref_free")
        | overrides
    )


def values_of(trainer):
    return {row["prompt"][0]["content"]: row["reward"] - row["advantage"] for row in trainer.train_dataset}


def test_no_value_comes_from_a_head_that_saw_its_reward(tiny_folder, tmp_path):
    rows = make_scored(16, prompts=8)
    folds = [tmp_path / name for name in ("a", "b")]
    one = build(tiny_folder, folds[0], rows, keep_negative_advantages=True, **head())
    prompt = rows[0]["prompt"]
    rewards = [1.0 if row["prompt"] == prompt else row["reward"] for row in rows]
    changed = rows.remove_columns("reward").add_column("reward", rewards)
    two = build(tiny_folder, folds[1], changed, keep_negative_advantages=True, **head())
    first, second = values_of(one), values_of(two)
    own = next(fold for key, fold in one.value_fold.items() if prompt[0]["content"] in key)
    for key, fold in one.value_fold.items():
        name = next(name for name in first if f'"{name}"' in key)
        if fold == own:
            assert second[name] == pytest.approx(first[name], abs=1e-6), "its head never saw the prompt"
        else:
            assert abs(second[name] - first[name]) > 1e-3
    assert all(0 < value < 1 for value in first.values())
    for trainer in (one, two):
        assert not any(head.training for head in trainer.value_heads)


@pytest.mark.slow
def test_heads_are_saved_beside_the_adapter_and_reused(tiny_folder, tmp_path, monkeypatch, logged):
    rows = make_scored(12)
    _, trainer = train(
        tiny_folder, tmp_path, rows, eval_dataset=make_scored(5, seed=4), **head(per_device_eval_batch_size=5)
    )
    assert "the value head learns from 12 different prompts; below 100 it rarely beats" in logged.text
    trainer.save_model()
    saved = value_head.load(tmp_path)
    assert len(saved) == 2 and (tmp_path / "adapter_model.safetensors").is_file()
    assert not any("query" in name for name in trainer.model.state_dict()), "no part of the policy"
    trainer.save_model(str(tmp_path / "copy"))
    assert len(value_head.load(tmp_path / "copy", trainer.value_head_key)) == 2
    monkeypatch.setattr(value_head, "fit", lambda *args, **kwargs: pytest.fail("a head was trained"))
    again = build(tiny_folder, tmp_path, rows, **head(per_device_eval_batch_size=2))
    assert values_of(again) == pytest.approx(values_of(trainer), abs=1e-5), "whatever the batches' padding"
    elsewhere = build(tiny_folder, tmp_path / "other", rows, **head(value_head_dir=str(tmp_path)))
    assert values_of(elsewhere) == pytest.approx(values_of(trainer), abs=1e-5)
    with pytest.raises(pytest.fail.Exception, match="a head was trained"):
        build(tiny_folder, tmp_path / "more", make_scored(13), **head(value_head_dir=str(tmp_path)))


@pytest.mark.slow
def test_a_best_metric_that_is_none_is_named_with_those_there_are(tiny_folder, tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "accuracy"}
    trainer = build(tiny_folder, tmp_path, make_scored(6), eval_dataset=make_scored(3, seed=4), **best)
    with pytest.raises(ConfigError, match="'eval_accuracy', which is not found .*'eval_loss'"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"variant": "wbc", "clip": 0.5}, "clip: 0.5 has no effect here: variant wbc has no importance ratio."),
        ({"variant": "r_lol", "value": "per_prompt"}, "value: per_prompt has no effect here: variant r_lol"),
        ({"reward_max": 4.0}, "reward_max: 4.0 has no effect here: value is mean."),
    ],
)
def test_settings_without_effect_are_named(tmp_path, settings, text, logged):
    ALoLConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert text in logged.text
    logged.clear()
    ALoLConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert "no effect" not in logged.text


@pytest.mark.slow
def test_the_card_names_the_variant_and_what_was_dropped(tiny_folder, tmp_path):
    from posttrain.hub.card import write_model_card

    trainer = build(tiny_folder, tmp_path, make_scored(6), variant="wbc")
    text = write_model_card(trainer).read_text()
    assert "trained with weighted behaviour cloning by" in text and "A-LoL by" not in text
    assert "| variant " in text and "| advantage_weighting " in text
    trainer = build(tiny_folder, tmp_path / "a", rows := make_scored(6))
    text = write_model_card(trainer).read_text()
    assert "trained with A-LoL by" in text and "| value " in text
    assert f"{len(trainer.train_dataset)} training rows of {len(rows)} (the others" in text


def share_of_vowels(prompts, completions, mark, **columns):
    assert mark == ["m"] * len(prompts), "the row's other columns go along"
    texts = [turns[0]["content"] for turns in completions]
    return [sum(text.count(letter) for letter in "aeiou") / max(len(text), 1) for text in texts]


@pytest.mark.slow
def test_heads_learn_from_the_models_own_generations(tiny_folder, tmp_path, tokenizer, monkeypatch):
    seen, call = [], UserReward.__call__

    def watched(self, prompts, completions, **columns):
        seen.append((prompts, [turns[0]["content"] for turns in completions]))
        return call(self, prompts=prompts, completions=completions, **columns)

    monkeypatch.setattr(UserReward, "__call__", watched)
    rows = make_scored(8, prompts=4, mark=["m"] * 8).remove_columns("reward")
    own = head(value_targets="generations", value_max_new_tokens=6, per_device_eval_batch_size=3)
    trainer = build(tiny_folder, tmp_path, rows, reward_func=share_of_vowels, **own)
    (_, answers), (prompts, generated) = seen
    assert answers == [row[0]["content"] for row in rows["completion"]] and len(generated) == 4
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for prompt, text in zip(prompts, generated, strict=True):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert text == tokenizer.decode(output[0, ids["input_ids"].size(1) :], skip_special_tokens=True)
    assert trainer.advantages.rows == 8
    again = build(tiny_folder, tmp_path, rows, reward_func=share_of_vowels, **own)
    assert len(seen) == 2, "scores and heads are found again"
    assert values_of(again) == pytest.approx(values_of(trainer), abs=1e-5)


def test_defaults(tmp_path, logged):
    args = ALoLConfig(str(tmp_path))
    assert (args.variant, args.clip, args.value, args.advantage_weighting) == ("a_lol", 0.9, "mean", "weight")
    assert ALoLConfig(str(tmp_path), value="column").value_column == "baseline"
    assert ALoLConfig(str(tmp_path), clip=None).clip is None
    assert not logged.text
    ALoLConfig(str(tmp_path), keep_negative_advantages=True)
    assert "answers below their value are pushed down, and nothing bounds how far" in logged.text


@pytest.mark.core("column")
@pytest.mark.parametrize("value", ["mean", "per_prompt", "column"])
def test_answers_lost_to_max_length_have_no_part_in_values_counts_or_rows(tiny_folder, tmp_path, value, logged):
    rows = make_scored(12, prompts=4)
    more = dict(value=value, variant="a_lol_ref_free", max_length=100)
    column = dict(baseline=[0.3] * 12) if value == "column" else {}
    lost = beyond(3, 1.0, rows.add_column("baseline", column["baseline"]) if column else rows)
    if column:
        lost = lost.remove_columns("baseline").add_column("baseline", [0.3] * 15)
    alone = build(tiny_folder, tmp_path / "alone", make_scored(12, prompts=4, **column), **more)
    logged.clear()
    trainer = build(tiny_folder, tmp_path / "lost", lost, **more)
    for name in ("prompt", "reward", "advantage", "weight", "input_ids", "labels"):
        assert trainer.train_dataset[name][:] == alone.train_dataset[name][:]
    assert trainer.advantages == alone.advantages and trainer.advantages.rows == 12
    assert logged.text.count("max_length 100 leaves nothing of 3 answers, which are left out and count nowhere") == 1
    held_out = build(
        tiny_folder, tmp_path / "held_out", rows.add_column("baseline", [0.3] * 12), eval_dataset=lost, **more
    )
    assert len(held_out.eval_dataset) == 12 and "eval_dataset: of 15 rows, max_length 100 leaves nothing" in logged.text


@pytest.mark.slow
def test_rewards_for_evaluation_may_be_said_to_be_on_one_scale(tiny_folder, tmp_path):
    far = make_scored(40, seed=1).map(lambda row: {"reward": 50 + 50 * row["reward"]})
    trainer = ALoLTrainer(
        tiny_folder, ALoLConfig(**settings(tmp_path)), train_dataset=make_scored(8), eval_dataset=far, same_scale=True
    )
    assert min(trainer.eval_dataset["advantage"]) > 40


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weight", "advantage", "labels", "input_ids", "ref_logps"])
def test_a_column_of_values_may_have_any_name(tiny_folder, tmp_path, name):
    more = dict(value="column", variant="a_lol_ref_free")
    plain = build(tiny_folder, tmp_path / "plain", make_scored(6, baseline=[0.25] * 6), **more)
    named = build(tiny_folder, tmp_path / "named", make_scored(6, **{name: [0.25] * 6}), value_column=name, **more)
    assert named.train_dataset.to_list() == plain.train_dataset.to_list()


@pytest.mark.slow
def test_evaluation_of_single_answers_by_their_own_reward_is_told(tiny_folder, tmp_path, logged):
    more = dict(value="per_prompt", variant="a_lol_ref_free")
    rows, single = make_scored(12, prompts=4), make_scored(5, seed=2)
    trainer = build(tiny_folder, tmp_path / "a", rows, eval_dataset=single, **more)
    assert trainer.eval_dataset["advantage"][:] == [0.0] * 5
    assert "eval_dataset: 5 of 5 answers are the only one to their prompt; with value: per_prompt" in logged.text
    assert "0 throughout and says nothing" in logged.text and "train_dataset: 5 of 5" not in logged.text
    logged.clear()
    build(tiny_folder, tmp_path / "b", rows, eval_dataset=make_scored(6, seed=2, prompts=3), **more)
    assert "the only one" not in logged.text


def test_the_watch_over_gradients_counts_steps_that_were_taken():
    trainer = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[{"lr": 0.1}]),
        state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(device="cpu", reduce=lambda values, reduction: values),
    )
    watch = watches.LiveGradients(torch.nn.Linear(1, 1))
    for _ in range(4):
        watch.before_step(trainer)
        assert not watch.after_step(trainer), "a data set without a batch"
    watch.before_step(trainer)
    trainer.state.global_step = 1
    assert not watch.after_step(trainer)
    watch.before_step(trainer)
    trainer.state.global_step = 2
    with pytest.raises(DivergedError, match="2 of 2 adapter tensors got no gradient in the first two steps"):
        watch.after_step(trainer)


def test_another_trainers_config_is_refused(tiny_folder, tmp_path):
    with pytest.raises(TypeError, match="args is a DPOConfig; it must be a posttrain.ALoLConfig"):
        ALoLTrainer(tiny_folder, args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=make_scored(4))


def test_which_adapters_start_as_the_identity():
    plain = lora()
    assert reference.starts_as_identity(plain)
    plain.init_lora_weights = "pissa"
    assert not reference.starts_as_identity(plain)
    assert not reference.starts_as_identity(PromptTuningConfig(num_virtual_tokens=2))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["wbc", "r_gold", "a_lol", "a_lol_seq"])
def test_sharing_prompts_leaves_the_update(tiny_folder, tmp_path, variant):
    # four prompts of four answers each
    rows = make_scored(16, prompts=4)
    run = dict(variant=variant, max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    run |= dict(eval_dataset=make_scored(6, seed=1, prompts=2), per_device_eval_batch_size=4)
    padded, parent = train(tiny_folder, tmp_path / "padded", rows, **run)
    shared, trainer = train(tiny_folder, tmp_path / "shared", rows, **run, prefix_sharing="always")
    assert trainer._sharing.active and distance(shared, padded) <= 1e-4
    for ours, theirs in zip(entries(trainer), entries(parent), strict=True):
        for name in ("loss", "nll/token", "entropy", "mean_token_accuracy", "num_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
        assert ours["tokens/padding_share"] <= theirs["tokens/padding_share"]
    ours, theirs = trainer.evaluate(), parent.evaluate()
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-4)


def test_prompts_are_shared_by_default(tmp_path):
    assert ALoLConfig(str(tmp_path)).prefix_sharing == "auto"


@pytest.mark.slow
def test_reference_values_of_shared_and_padded_rows_are_kept_apart(tiny_folder, tmp_path):
    keys = {build(tiny_folder, tmp_path / name, prefix_sharing=name).reference_key for name in ("never", "auto")}
    assert len(keys) == 2


def test_tools_are_part_of_a_prompt():

    rows = [
        {"prompt": "p", "completion": "c", "reward": r, "tools": t} for t, r in (("a", 0.0), ("b", 1.0), ("b", 0.8))
    ]
    assert baselines.values_of(Dataset.from_list(rows), "per_prompt", None, "rows") == [0.0, 0.9, 0.9]
    alike = Dataset.from_list(rows).remove_columns("tools")
    assert baselines.values_of(alike, "per_prompt", None, "rows") == pytest.approx([0.6] * 3)


def test_a_head_that_learns_from_few_prompts_is_named(logged):
    ALoLAnswers(SimpleNamespace(value_folds=2, value_prompts=30)).check_value_prompts(1000, "rows")
    assert "learns from 30 different prompts" in logged.text


def test_equal_rewards_pass_where_values_come_from_generations():
    rows = make_scored(6, prompts=6).remove_columns("reward").add_column("reward", [1.0] * 6)
    args = SimpleNamespace(
        weighs_by="advantages", value="head", value_targets="generations", value_folds=2, value_prompts=100
    )
    ALoLAnswers(args).check_left(rows)
    args.value_targets = "answers"
    with pytest.raises(DataError, match="all 6 rewards are equal"):
        ALoLAnswers(args).check_left(rows)
