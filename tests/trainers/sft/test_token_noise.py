"""Noise on tokens in a run: one update whatever the layout, clean evaluation, tokens a forward of generation."""

import math
from types import SimpleNamespace

import pytest
from datasets import Dataset
from peft import PromptTuningConfig

from posttrain.errors import ConfigError
from posttrain.trainers.sft import token_noise
from tests.runs import distance, identical
from tests.trainers.sft.test_noisy_sft import build, logs_of, make_rows, train

MSN = dict(token_noise="msn", token_noise_length=3)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return train(tmp_path_factory.mktemp("noisy"), **MSN, per_device_train_batch_size=16, max_steps=1)


@pytest.mark.core("packed")
@pytest.mark.parametrize(
    "layout",
    [
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=4),
        dict(per_device_train_batch_size=16, padding_free=True, max_length=None),
        dict(packing=True, max_length=4096, per_device_train_batch_size=1),
        dict(per_device_train_batch_size=16, gradient_checkpointing=True),
    ],
    ids=["split", "padding-free", "packed", "checkpointed"],
)
def test_the_layout_of_a_batch_changes_no_update(layout, noisy, tmp_path):
    expected, whole = noisy
    change, trainer = train(tmp_path, **MSN, max_steps=1, **layout)
    assert distance(change, expected) < 1e-5
    for name in ("num_tokens", "loss", "noise/tokens", "noise/skipped"):
        assert trainer.state.log_history[0][name] == pytest.approx(whole.state.log_history[0][name], rel=1e-4), name


def test_the_noise_changes_the_update_and_is_in_no_evaluation(noisy, tmp_path):
    clean, trainer = train(tmp_path / "clean", per_device_train_batch_size=16, max_steps=1)
    assert distance(clean, noisy[0]) > 0.1
    told = noisy[1].state.log_history[0]
    assert 0 < told["noise/tokens"] < 1 and 0 <= told["noise/skipped"] < 1
    rows = make_rows().select(range(5))
    still = build(tmp_path / "still", **MSN, learning_rate=0.0, eval_dataset=rows)
    before = still.evaluate()["eval_loss"]
    still.train()
    assert still.evaluate()["eval_loss"] == before
    assert build(tmp_path / "plain", learning_rate=0.0, eval_dataset=rows).evaluate()["eval_loss"] == before


def test_a_resumed_run_draws_what_the_straight_one_draws(tmp_path):
    settings = dict(MSN, max_steps=4, save_steps=2)
    expected, straight = train(tmp_path / "run", **{**settings, "save_strategy": "steps"})
    change, resumed = train(
        tmp_path / "run", **{**settings, "save_strategy": "steps"}, resume=str(tmp_path / "run" / "checkpoint-2")
    )
    assert identical(change, expected) and logs_of(resumed)[:4] == logs_of(straight)[:4]
    with pytest.raises(ConfigError, match="tokens: msn, 3 tokens of a share of 1.0 there, msn, 2 tokens"):
        train(tmp_path / "run", **{**settings, "token_noise_length": 2}, resume=str(tmp_path / "run" / "checkpoint-2"))


def test_an_evaluation_tells_the_tokens_a_forward_of_generation_is_good_for(tmp_path):
    rows = make_rows().select(range(5))
    trainer = build(tmp_path, **MSN, eval_dataset=rows, accepted_tokens_rows=3, accepted_tokens_length=12)
    found = trainer.evaluate()["eval_accepted_tokens"]
    assert 1 <= found <= 6
    assert "eval_accepted_tokens" not in build(tmp_path, **MSN, eval_dataset=rows).evaluate()


@pytest.mark.parametrize("format", ["torch", "numpy", None])
def test_prompts_are_cut_to_the_positions_there_are(format):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [5, 6], "labels": [5, 6]},
        {"input_ids": list(range(9)), "labels": [-100] * 8 + [8]},
    ]
    found = token_noise.prompts(Dataset.from_list(rows).with_format(format), 4, 6)
    assert found == [([5, 6], 4), ([5], 4), (list(range(8)), -1)]
    unlabelled = Dataset.from_list([{"input_ids": [3, 4]}]).with_format(format)
    assert token_noise.prompts(unlabelled, 4, math.inf) == [([3], 4)]


def test_rows_without_room_for_an_answer_end_no_evaluation(tmp_path, logged):
    ids = Dataset.from_list(
        [{"input_ids": [4 + i % 9 for i in range(n)], "labels": [-100] * (n - 1) + [5]} for n in (4, 14, 16)] * 2
    )
    trainer = build(
        tmp_path, rows=ids, kind=dict(architecture="gpt2", max_position_embeddings=16), max_length=16,
        eval_dataset=ids.with_format("numpy"), accepted_tokens_rows=3, accepted_tokens_length=6,
    )  # fmt: skip
    for _ in range(2):
        assert 1 <= trainer.evaluate()["eval_accepted_tokens"] <= 6
    assert logged.text.count("too few learned positions behind 2 of 3 rows") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(eval_dataset=None),
            "accepted_tokens_rows is 3, which evaluations alone read",
        ),
        (dict(config="mamba"), "rows is 3, and the cache of MambaForCausalLM cannot give tokens back"),
        (
            dict(peft_config=PromptTuningConfig(num_virtual_tokens=2)),
            "rows is 3, and the adapter is PR",
        ),
        (dict(beams=4), "accepted_tokens_rows is 3, and the generation config has num_beams 4"),
    ],
    ids=["set", "cache", "adapter", "beams"],
)
def test_what_an_evaluation_cannot_generate_is_refused_before_weights_load(changes, message, tmp_path):
    from transformers import GenerationConfig, LlamaConfig, MambaConfig

    GenerationConfig(num_beams=changes.pop("beams", 1)).save_pretrained(tmp_path)
    args = SimpleNamespace(accepted_tokens_rows=3, model_init_kwargs=None)
    given = dict(config="llama", peft_config=None, eval_dataset=make_rows()) | changes
    given["config"] = {"llama": LlamaConfig, "mamba": MambaConfig}[given["config"]]()
    with pytest.raises(ConfigError, match=message):
        token_noise.check_accepted(str(tmp_path), args, **given)
    token_noise.check_accepted(str(tmp_path), SimpleNamespace(accepted_tokens_rows=0), **given)


def test_rows_without_a_prompt_of_their_own_are_said(tmp_path, logged):
    trainer = build(tmp_path, rows=Dataset.from_list([{"text": "some words here " + str(i)} for i in range(16)]), **MSN)
    trainer.train()
    assert logged.text.count("rows are learned from their first token on, so prompts are noised like answers") == 1


def test_a_run_whose_answers_have_one_token_stops(tmp_path):
    rows = Dataset.from_list([{"input_ids": [1, 2, 3, 4 + i], "labels": [-100, -100, -100, 4 + i]} for i in range(16)])
    with pytest.raises(ConfigError, match="token_noise replaced no token in the first step"):
        build(tmp_path, rows=rows, **MSN).train()
