"""Every number that a dry run tells is that of the trainer which is then built."""

import copy

import pytest
import torch
from datasets import concatenate_datasets
from peft import LoraConfig
from safetensors.torch import load_file

from posttrain import ALoLConfig, ALoLTrainer, NoisySFTConfig, RobustDPOConfig, RobustDPOTrainer
from posttrain.data.pairs import schema
from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.models import tiny_model
from posttrain.recipe import dry_run, instructions, preferences, scored_answers
from tests import runs, scored, training
from tests.conftest import make_pairs
from tests.contract.conftest import cases
from tests.families import METHODS, UNLOADED

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
ADAPTERS = {
    "none": None,
    "linear": LoraConfig(r=4, target_modules="all-linear"),
    "embedding": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "saved head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
}


def test_of_pairs_their_tokens(tiny_folder, tmp_path):
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    args = RobustDPOConfig(**training.settings(tmp_path, max_length=64, **split))
    rows = make_pairs(13)
    told = preferences.describe(tiny_folder, args, rows)
    trainer = RobustDPOTrainer(tiny_folder, args=args, train_dataset=rows)
    sides = [
        min(len(row["prompt_ids"]) + len(row[side]), 64)
        for row in trainer.train_dataset
        for side in ("chosen_ids", "rejected_ids")
    ]
    assert told["longest sequence in the sample (tokens)"] == max(sides)
    assert told["tokens per step"] == round(2 * 6 * sum(sides) / len(sides))


def test_of_scored_answers_how_many_are_left(tiny_folder, tmp_path):
    args = ALoLConfig(**scored.settings(tmp_path))
    rows = scored.make_scored(26)
    told = scored_answers.describe(tiny_folder, args, scored_answers.ScoredArguments(dataset_name="a"), rows)
    trainer = ALoLTrainer(tiny_folder, args=args, train_dataset=rows)
    assert told["scored answers"] == trainer.given_rows == 26
    assert told["of them with a gradient"] == len(trainer.train_dataset) < 26
    assert told["of them within max_length"] == trainer.advantages.rows


@pytest.mark.core("robust_dpo-0", "a_lol-0", "policy_gradient-0", "noisy_sft-0")
@pytest.mark.parametrize("method, place", cases("laid_out"))
def test_of_every_method_its_steps_rows_and_parameters(method, place, tiny_folder, tmp_path):
    given = dict(rows=13, max_steps=-1, num_train_epochs=1) | method.laid_out[place]
    told = method.describe(tiny_folder, tmp_path, **given)
    _, trainer = method.train(tiny_folder, tmp_path, **given)
    assert told["steps"] == trainer.state.global_step == trainer.state.max_steps > 0
    assert [told[name] for name in method.counted] == [len(trainer.train_dataset)]
    batch = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    per_step = {name: value for name, value in told.items() if name.endswith(" per step") and name != "tokens per step"}
    assert list(per_step.values()) == [batch] and told["processes"] == 1
    assert told["parameters"] == sum(
        value.numel() for name, value in trainer.model.named_parameters() if ".ref." not in name
    )


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory, tokenizer):
    """A folder with a tiny model's config and tokenizer."""
    folder = tmp_path_factory.mktemp("no_weights")
    tiny_model().config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


REFUSED = [
    pytest.param(method, said, settings, id=f"{method.name}-{'-'.join(settings)}")
    for method in METHODS.values()
    for said, settings in (UNLOADED | method.unloaded).items()
]


# schemes of adapters have the dry run of a method that is here; what they refuse themselves stays
@pytest.mark.core(
    *(case.id for case in REFUSED if case.values[0].name not in ("gift_sw", "allora") or case.values[1] not in UNLOADED)
)
@pytest.mark.parametrize("method, said, settings", REFUSED)
@pytest.mark.filterwarnings("ignore:`(pad|eos)_token` is deprecated:FutureWarning")
def test_a_run_and_its_dry_run_refuse_the_same_before_a_weight_is_loaded(
    method, said, settings, without_weights, tmp_path
):
    found = []
    for call in (method.describe, method.train):
        with pytest.raises((ConfigError, EnvironmentIssue), match=said) as refused:
            call(without_weights, tmp_path, **settings)
        found.append((type(refused.value), str(refused.value)))
    assert found[0] == found[1] and not list(tmp_path.iterdir())


def test_trained_biases_under_a_live_reference_are_refused_by_the_dry_run_too(without_weights, tmp_path):
    args, adapter = RobustDPOConfig(**training.settings(tmp_path)), LoraConfig(target_modules="all-linear", bias="all")
    with pytest.raises(ConfigError, match="the adapter's bias is 'all'"):
        preferences.describe(without_weights, args, make_pairs(4), adapter)


def overlong(rows, n: int = 5):
    """Put `n` rows before others whose prompt alone has more than 64 tokens."""
    long = rows.select([0] * n).map(lambda row: {"prompt": [{"role": "user", "content": "cat " * 75}]})
    return concatenate_datasets([long, rows])


def test_what_max_length_drops_is_neither_counted_nor_shown(tiny_folder, tmp_path):
    args = RobustDPOConfig(**training.settings(tmp_path, max_length=64, prefix_sharing="never"))
    told = preferences.describe(tiny_folder, args, overlong(make_pairs(8)))
    alone = preferences.describe(tiny_folder, args, make_pairs(8))
    assert told == alone and told["training pairs"] == 8
    rows = scored.make_scored(8)
    args = ALoLConfig(**scored.settings(tmp_path, max_length=64, variant="wbc"))
    given = scored_answers.ScoredArguments(dataset_name="a")
    told = scored_answers.describe(tiny_folder, args, given, overlong(rows))
    alone = scored_answers.describe(tiny_folder, args, given, rows)
    assert told == alone | {"scored answers": 13} and told["reward"] == rows[0]["reward"]
    args = NoisySFTConfig(str(tmp_path), max_length=64, **runs.SETTINGS)
    told = instructions.describe(tiny_folder, args, overlong(rows.remove_columns("reward")))
    alone = instructions.describe(tiny_folder, args, rows.remove_columns("reward"))
    assert told == alone | {"training rows": 13}


def test_pairs_of_a_large_data_set_are_counted_where_a_sample_shows_that_some_are_dropped(
    tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(schema, "SAMPLE", 10)
    run = dict(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8)
    args = RobustDPOConfig(**training.settings(tmp_path, max_length=64, **run))
    told = preferences.describe(tiny_folder, args, overlong(make_pairs(16)))
    assert told["training pairs"] == 16 and told["steps"] == 2


def test_an_answer_without_gradient_is_not_shown(tiny_folder, tmp_path):
    rows = scored.make_scored(6, baseline=[2.0, 2.0, -1.0, -1.0, -1.0, -1.0])
    args = ALoLConfig(**scored.settings(tmp_path, value="column", value_column="baseline"))
    told = scored_answers.describe(tiny_folder, args, scored_answers.ScoredArguments(dataset_name="a"), rows)
    assert told["of them with a gradient"] == 4 and told["reward"] == rows[2]["reward"]
    assert rows[2]["prompt"][0]["content"] in told["prompt"]


@pytest.mark.core("True-embedding", "True-saved head", "False-tokens")
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
def test_of_parameters(adapter, tied, tmp_path, tokenizer):
    tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    args = RobustDPOConfig(**training.settings(tmp_path / "run"))
    config = copy.deepcopy(ADAPTERS[adapter])
    trainer = RobustDPOTrainer(str(tmp_path / "base"), args=args, train_dataset=make_pairs(4), peft_config=config)
    # the reference's copy of an adapter is not of the model that is told
    values = {name: value for name, value in trainer.model.named_parameters() if ".ref." not in name}
    told = dry_run.sizes(trainer.model.config, args, config)
    assert told["parameters"] == sum(value.numel() for value in values.values())
    trainable = sum(value.numel() for value in values.values() if value.requires_grad)
    assert told["trainable parameters"] == trainable


@pytest.mark.core("True-embedding", "True-pissa")
@pytest.mark.parametrize("adapter", [*ADAPTERS, "pissa", "tied"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning")
def test_of_the_bytes_of_a_checkpoint(adapter, tied, tmp_path, tokenizer):
    tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    more = {
        "pissa": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
        "tied": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    }
    config = copy.deepcopy((ADAPTERS | more)[adapter])
    run = dict(max_steps=1, optim="adamw_torch", save_strategy="steps", save_steps=1)
    args = RobustDPOConfig(**training.settings(tmp_path / "run", **run))
    trainer = RobustDPOTrainer(str(tmp_path / "base"), args=args, train_dataset=make_pairs(4), peft_config=config)
    told = dry_run.sizes(trainer.model.config, args, copy.deepcopy((ADAPTERS | more)[adapter]))
    trainer.train()
    [weights] = (tmp_path / "run/checkpoint-1").glob("*model.safetensors")
    states = torch.load(weights.parent / "optimizer.pt")["state"].values()
    moments = sum(value.numel() for state in states for name, value in state.items() if name != "step")
    assert told["checkpoint bytes (estimate)"] == 4 * (sum(v.numel() for v in load_file(weights).values()) + moments)
