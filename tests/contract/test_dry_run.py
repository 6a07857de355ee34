"""Every number that a dry run tells is that of the trainer which is then built."""

import copy

import pytest
from datasets import concatenate_datasets
from peft import LoraConfig

from posttrain import ALoLConfig, ALoLTrainer, NoisySFTConfig, RobustDPOConfig, RobustDPOTrainer
from posttrain.models import tiny_model
from posttrain.recipe import dry_run, instructions, preferences, scored_answers, tasks
from tests import rollouts, runs, scored, training
from tests.conftest import make_pairs

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
SPLITS = [
    dict(per_device_train_batch_size=4, gradient_accumulation_steps=1),
    dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, dataloader_drop_last=True),
    dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=1.5),
    dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, dataloader_drop_last=True, num_train_epochs=2),
]
ADAPTERS = {
    "none": None,
    "linear": LoraConfig(r=4, target_modules="all-linear"),
    "embedding": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "saved head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
}


def taken(trainer) -> int:
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps
    return trainer.state.max_steps


@pytest.mark.core("split2")
@pytest.mark.parametrize("split", SPLITS)
def test_of_pairs(split, tiny_folder, tmp_path):
    args = RobustDPOConfig(**training.settings(tmp_path, max_steps=-1, max_length=64, **split))
    rows = make_pairs(13)
    told = preferences.describe(tiny_folder, args, rows)
    trainer = RobustDPOTrainer(tiny_folder, args=args, train_dataset=rows)
    assert told["training pairs"] == len(trainer.train_dataset)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert told["pairs per step"] == batch and told["processes"] == 1
    sides = [
        min(len(row["prompt_ids"]) + len(row[side]), 64)
        for row in trainer.train_dataset
        for side in ("chosen_ids", "rejected_ids")
    ]
    assert told["longest sequence in the sample (tokens)"] == max(sides)
    assert told["tokens per step"] == round(2 * batch * sum(sides) / len(sides))
    assert told["parameters"] == sum(value.numel() for value in trainer.model.parameters())
    assert told["steps"] == taken(trainer)


@pytest.mark.core("split3")
@pytest.mark.parametrize("split", SPLITS)
def test_of_scored_answers(split, tiny_folder, tmp_path):
    args = ALoLConfig(**scored.settings(tmp_path, **{"max_steps": -1, **split}))
    rows = scored.make_scored(26)
    told = scored_answers.describe(tiny_folder, args, scored_answers.ScoredArguments(dataset_name="a"), rows)
    trainer = ALoLTrainer(tiny_folder, args=args, train_dataset=rows)
    assert told["scored answers"] == trainer.given_rows == 26
    assert told["of them with a gradient"] == len(trainer.train_dataset) < 26
    assert told["of them within max_length"] == trainer.advantages.rows
    assert told["steps"] == taken(trainer)


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


def test_pairs_of_a_large_data_set_are_counted_where_a_sample_shows_that_some_are_dropped(tiny_folder, tmp_path):
    args = RobustDPOConfig(
        **training.settings(tmp_path, max_length=64, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8)
    )
    rows = concatenate_datasets([overlong(make_pairs(8)), make_pairs(8).select([i % 8 for i in range(1200)])])
    told = preferences.describe(tiny_folder, args, rows)
    assert told["training pairs"] == 1208 and told["steps"] == 151


def test_an_answer_without_gradient_is_not_shown(tiny_folder, tmp_path):
    rows = scored.make_scored(6, baseline=[2.0, 2.0, -1.0, -1.0, -1.0, -1.0])
    args = ALoLConfig(**scored.settings(tmp_path, value="column", value_column="baseline"))
    told = scored_answers.describe(tiny_folder, args, scored_answers.ScoredArguments(dataset_name="a"), rows)
    assert told["of them with a gradient"] == 4 and told["reward"] == rows[2]["reward"]
    assert rows[2]["prompt"][0]["content"] in told["prompt"]


@pytest.mark.core("split1")
@pytest.mark.parametrize(
    "split",
    [
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, num_generations=4),
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_generations=4, num_train_epochs=2),
        dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, num_generations=2, num_iterations=2),
    ],
)
def test_of_tasks(split, tiny_folder, tmp_path):
    kind, config = rollouts.PRESETS["qae"]
    args = config(**rollouts.settings(tmp_path, **{"max_steps": -1, **split}))
    rows = rollouts.prompts([1, 0, 4, 2, 3])
    told = tasks.describe(tiny_folder, args, tasks.TaskArguments(dataset_name="a"), rows)
    trainer = kind(tiny_folder, rollouts.success, args, rows, rollout_func=rollouts.rollouts)
    assert told["training tasks"] == len(trainer.train_dataset) == 5
    assert told["rollouts per step"] == args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert told["steps"] == taken(trainer)


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
    assert told["checkpoint bytes (estimate)"] == 12 * trainable
